"""The training loop: windows in, checkpoints out. One loop for every architecture, the entropy model included.

    draw(step) → score → nats → backward → clip → nats, norm → finite? a spike? → AdamW → journal
    now and then valid, sample, save

On a GPU a step is prepared while the one before it runs, and synchronizes once: for its nats and its norm together.

Only `Progress`, `Spikes` and the optimizer's moments are carried from step to step, and every checkpoint has
them; a window is a pure function of (seed, step), so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.data.sampler import Sampler
from bytelm.device import peak_memory
from bytelm.errors import CheckpointError, TrainingError
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import prepare, scored
from bytelm.threads import StepThreads
from bytelm.training import lengths
from bytelm.training.ahead import Ahead
from bytelm.training.config import TrainConfig
from bytelm.training.dist import SINGLE_PROCESS, DistContext
from bytelm.training.draw import Drawn, draw, to_tensors
from bytelm.training.journal import Journal
from bytelm.training.memory import give_back_large_blocks, keep_large_blocks, predict, recomputes
from bytelm.training.optimise import Optimizer, learning_rate
from bytelm.training.spikes import Spikes
from bytelm.training.stop import StopRequest
from bytelm.transfer import to_host
from bytelm.units import bits_per_byte, show_bytes, show_seconds

PATIENCE = 10  # consecutive steps that may be skipped for a non-finite loss or gradient


@dataclass(frozen=True)
class Progress:
    """Progress of a run. `seconds` are spent in the loop, over all sessions; `bytes` are those trained on."""

    step: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Outcome:
    """Outcome of this session: the progress, and the signal that interrupted it, if one did."""

    progress: Progress
    signal: int | None


@dataclass
class RunningSums:
    """Sums since the last line of the journal, divided once when it is written."""

    nats: float = 0.0
    bytes: int = 0
    patches: int = 0
    since: float = 0.0
    lengths: Tensor = field(default_factory=lambda: torch.zeros(lengths.LONGEST, dtype=torch.long))


class Trainer:
    """One model, its data and its run directory."""

    def __init__(
        self,
        model: ByteModel,
        config: TrainConfig,
        sampler: Sampler,
        run: Path,
        journal: Journal,
        *,
        valid: Sampler | None = None,
        recipe: dict[str, Any] | None = None,
        sample: Callable[[ByteModel], tuple[bytes, bytes]] | None = None,
        dist: DistContext = SINGLE_PROCESS,
    ) -> None:
        self.model, self.config, self.sampler, self.run, self.journal = model, config, sampler, run, journal
        self.dist = dist
        self.valid, self.recipe, self.sample = valid, recipe, sample
        self.precision = precision(config, model.device)
        self.optimizer = Optimizer(model, config)
        # On a CPU a thread would cost the step as much as it saves.
        self.ahead = None if model.device.type == "cpu" else Ahead(self.draw, model.device)
        # Processes that wait for each other every step would measure one another.
        self.threads = StepThreads(model.device.type == "cpu" and dist.world == 1)
        self.progress = Progress()
        self.spikes = Spikes()
        self.nonfinite_steps = 0  # consecutive non-finite steps
        self.warned = False  # that the disk is nearly full
        self.tally = RunningSums()
        self.mean_patch = 1.0  # bytes, as last logged
        self.baseline = 0  # peak memory in bytes before the first step of this session
        if model.device.type == "cpu":
            (give_back_large_blocks if config.activation_checkpointing else keep_large_blocks)()
        for stage in model.stages(1, 1):
            stage.stack.recompute = recomputes(config, stage.name)
        model.set_dropout(config.dropout)
        for block in model.blocks() if config.compile else ():
            block.compile(dynamic=True)  # one by one: BLT reads patches between the blocks of its decoder

    # --- one session --------------------------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train until the budget is used up or a stop signal, from the latest intact checkpoint if there is one.

        Raises TrainingError after too many consecutive non-finite steps; the progress before them is saved.
        """
        self.resume()
        self.model.train()
        self.baseline = peak_memory(self.model.device)
        valid_due = save_due = time.monotonic()
        valid_due += 60 * self.config.eval_every_minutes
        save_due += 60 * self.config.checkpoint_every_minutes
        self.tally = RunningSums(since=time.monotonic())
        with StopRequest() as stop, self.ahead or contextlib.nullcontext():
            while self.budget_fraction() < 1 and self.dist.agreed(stop.received) is None:
                with self.threads.step():
                    self.step()
                now = time.monotonic()
                if not self.dist.is_main_process:
                    continue
                if now >= valid_due and self.budget_fraction() < 0.95:  # the last validation is at the end
                    self.validate(stop)
                    valid_due = time.monotonic() + 60 * self.config.eval_every_minutes
                if now >= save_due and stop.received is None:
                    self.save()
                    save_due = time.monotonic() + 60 * self.config.checkpoint_every_minutes
            if self.dist.is_main_process and self.budget_fraction() >= 1:
                self.validate(stop)
            if self.dist.is_main_process:
                self.save()
            return Outcome(self.progress, self.dist.agreed(stop.received))

    def budget_fraction(self) -> float:
        """The fraction of the budget that is used up."""
        return self.config.budget.fraction(self.progress.step, self.progress.bytes, self.progress.seconds)

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Accumulate gradients over the micro-batches, then take the optimizer step or skip it: see `refusal`."""
        config, progress = self.config, self.progress
        began = time.monotonic()
        drawn = self.ahead.take(progress.step) if self.ahead else self.draw(progress.step)
        bytes, symbols, patches = map(int, self.dist.total(drawn.bytes, drawn.symbols, drawn.patches))
        if config.dropout:  # the mask depends on the step and the rank
            torch.manual_seed((config.seed << 32) + (self.dist.rank << 26) + progress.step)
        found: list[Tensor] = []
        for batch in drawn.batches:
            with self.autocast():
                summed, _ = scored(self.model, batch)
            (summed / max(1, symbols)).backward()
            found.append(summed.detach())
        self.optimizer.share(self.dist)
        *parts, norm = numbers([*found, self.optimizer.norm()])  # the only synchronization
        (nats,) = self.dist.total(added(parts))
        rate = learning_rate(config, progress.step, self.budget_fraction())
        skip_reason = self.skip_reason(nats, bytes, norm)
        if skip_reason is None:
            self.optimizer.step(rate)
        self.optimizer.zero_grad()
        seconds = progress.seconds + self.dist.longest(time.monotonic() - began)
        self.progress = Progress(
            progress.step + 1, progress.bytes + bytes, seconds, progress.skipped + (skip_reason is not None)
        )
        self.tally.lengths += drawn.lengths
        self.log_step(skip_reason, nats, bytes, patches, rate, norm)

    def draw(self, step: int) -> Drawn:
        """The inputs of a step that depend on the data alone, not on the weights."""
        return draw(self.model, self.sampler, step, self.config.gradient_accumulation_steps)

    def skip_reason(self, nats: float, bytes: int, norm: float) -> str | None:
        """Why a step must be skipped, or None: non-finite values, or a spike compared with recent steps."""
        if not (math.isfinite(nats) and math.isfinite(norm)):
            self.nonfinite_steps += 1
            return f"loss {nats!r} nats, gradient norm {norm!r}"
        self.nonfinite_steps = 0
        if self.config.spikes == "keep" or not bytes:
            return None
        # A norm below the clipping threshold is no spike, however small the recent ones.
        return self.spikes.judge(
            bits_per_byte=bits_per_byte(nats, bytes), grad_norm=max(norm, self.config.max_grad_norm)
        )

    def log_step(
        self, skip_reason: str | None, nats: float, bytes: int, patches: int, rate: float, norm: float
    ) -> None:
        """Log the step, and stop a run after too many non-finite steps."""
        progress, tally = self.progress, self.tally
        if skip_reason is not None:
            told = {**dataclasses.asdict(progress), "reason": skip_reason, "nats": repr(nats), "grad_norm": repr(norm)}
            self.journal.write("skipped", **told)
            self.journal.say(f"step {progress.step} skipped: {skip_reason}; weights unchanged")
            if self.nonfinite_steps >= PATIENCE:
                if self.dist.is_main_process:
                    self.save()
                raise TrainingError(
                    f"{self.nonfinite_steps} consecutive steps with a non-finite loss or gradient, "
                    f"up to step {progress.step}: lower train.learning_rate = {self.config.learning_rate} "
                    f"and fine-tune from {self.run}"
                )
            return
        tally.nats, tally.bytes, tally.patches = tally.nats + nats, tally.bytes + bytes, tally.patches + patches
        now = time.monotonic()
        if tally.bytes and (progress.step == 1 or now - tally.since >= 1.0 or self.budget_fraction() >= 1):
            speed = tally.bytes / max(1e-9, now - tally.since)
            bpb = bits_per_byte(tally.nats, tally.bytes)
            mean = tally.bytes / tally.patches if tally.patches else None
            self.mean_patch = mean or 1.0
            self.journal.write(
                "train",
                **dataclasses.asdict(progress),
                bits_per_byte=bpb,
                learning_rate=rate,
                grad_norm=norm,
                bytes_per_second=speed,
                mean_patch=mean,
                patch_lengths=tally.lengths.tolist() if mean else None,
            )
            self.journal.progress(self.line(bpb, speed, mean), force=progress.step == 1)
            self.tally = RunningSums(since=now)

    def line(self, bpb: float, speed: float, mean_patch: float | None) -> str:
        """The progress line."""
        patch = f" | mean patch {mean_patch:.2f} B" if mean_patch else ""
        used = self.budget_fraction()
        left = self.progress.seconds * (1 - used) / used if used else 0.0
        return (
            f"step {self.progress.step} | {bpb:.3f} bits/byte | {show_bytes(speed)}/s{patch} "
            f"| processed {show_bytes(self.progress.bytes)} | ETA {show_seconds(left)}"
        )

    # --- now and then -------------------------------------------------------------------------------------------------

    def validate(self, stop: StopRequest) -> None:
        """Evaluate the same validation windows each time, and log a generated sample.

        An interrupted validation logs nothing; it is repeated by the session that resumes.
        """
        progress, began = dataclasses.asdict(self.progress), time.monotonic()
        self.model.eval()
        if self.valid is not None:
            found, bytes = list[Tensor](), 0
            for step in range(self.valid.windows):
                ids, boundaries = to_tensors(self.valid.batch(step))
                with torch.no_grad(), self.autocast(), self.threads.step(0):
                    summed, count = scored(self.model, prepare(self.model, ids, boundaries=boundaries))
                found.append(summed)
                bytes += int(count)
                if bytes >= self.config.eval_bytes or stop.received is not None:
                    break
            nats = added(numbers(found))
            if stop.received is None:
                bpb = bits_per_byte(nats, bytes)
                self.journal.write("validation", **progress, bits_per_byte=bpb)
                self.journal.say(f"step {self.progress.step}: validation {bpb:.3f} bits/byte")
        if self.sample is not None and stop.received is None:
            prompt, text = self.sample(self.model)
            shown = {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}
            self.journal.write("sample", **progress, **shown)
        self.model.train()
        duration = time.monotonic() - began
        self.journal.write("phase", **progress, name="validation", duration=duration)
        self.tally.since += duration  # not counted in the training throughput

    def save(self) -> None:
        """Write a checkpoint of the current step, and log its time and memory.

        Warns once if the disk has no room for two more.
        """
        progress, began = dataclasses.asdict(self.progress), time.monotonic()
        moments: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for key, value in self.optimizer.moments(parameter).items():
                    moments[f"{name}/{key}"] = torch.as_tensor(value)
        state = {**progress, "recipe": self.recipe, "context": self.config.context_length, "spikes": self.spikes.state}
        state |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "world": self.dist.world}
        state["precision"] = str(self.precision)
        path = store.save(self.run, self.progress.step, {"model": self.model.state_dict(), "optimizer": moments}, state)
        self.journal.write("phase", **progress, name="saving", duration=time.monotonic() - began)
        low = self.precision == torch.bfloat16
        device = self.model.device
        predicted = predict(self.model, self.config, self.mean_patch, device).peak if low else None
        memory = {"peak": peak_memory(device), "baseline": self.baseline, "predicted": predicted}
        self.journal.write("memory", **progress, **memory)
        size, free = sum(file.stat().st_size for file in path.iterdir()), shutil.disk_usage(path).free
        if free < 2 * size and not self.warned:
            self.warned = True
            self.journal.say(
                f"the disk of {self.run} has {show_bytes(free)} free, a checkpoint takes {show_bytes(size)}"
            )

    def resume(self) -> None:
        """Resume from the latest intact checkpoint, if there is one, and report corrupt ones."""
        if not store.checkpoints(self.run):
            self.journal.truncate_after(0)
            return
        path, corrupt = store.newest_good(self.run)
        for reason in corrupt:
            self.journal.say(f"skipping corrupt checkpoint: {reason}")
        weights = store.read_tensors(path, "model")
        store.check_keys(self.model.state_dict(), weights, str(path))
        if self.model.tokens is not None and not torch.equal(weights["merges"], self.model.get_buffer("merges").cpu()):
            raise CheckpointError(
                f"{path} was trained with another tokenizer than {self.run}/merges.npy: start another run"
            )
        for name, tensor in self.model.state_dict().items():
            if name.startswith("patcher.") and not torch.equal(weights[name], tensor.cpu()):
                raise CheckpointError(
                    f"{path} was trained with another entropy model than that in {self.run} "
                    f"({name} differs): restore it, or start another run"
                )
        self.model.load_state_dict(weights)
        moments = store.read_tensors(path, "optimizer")
        for name, parameter in self.model.named_parameters():
            own = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
            if own:
                kept = {key: place(value, parameter, key) for key, value in own.items()}
                self.optimizer.moments(parameter).update(kept)
        state = store.read_state(path)
        try:
            self.progress = Progress(**{f.name: state[f.name] for f in dataclasses.fields(Progress)})
            self.spikes = Spikes(state.get("spikes"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / store.STATE} was not written by this loop ({error!r})") from None
        self.journal.truncate_after(self.progress.step)
        self.journal.write("resumed", **dataclasses.asdict(self.progress))
        self.journal.say(f"resuming from step {self.progress.step} ({show_bytes(self.progress.bytes)} processed)")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 matrix products if the run is configured so."""
        low = self.precision == torch.bfloat16
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=low)


def place(value: Tensor, parameter: Tensor, key: str) -> Tensor | int:
    """A moment on its parameter's device; a step count where fused kernels need it, or unchanged as an integer."""
    if key == "step" and not value.is_floating_point():
        return int(value)
    return value if key == "step" and parameter.device.type == "cpu" else value.to(parameter.device)


def numbers(found: list[Tensor]) -> list[float]:
    """Numbers computed on a device, copied to the host at once."""
    return to_host(torch.stack(found)).tolist()


def added(values: list[float]) -> float:
    """Their sequential sum: Python's own `sum` rounds differently from 3.12 on."""
    return functools.reduce(operator.add, values, 0.0)


def precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: by default bfloat16 only with native hardware support."""
    if config.precision == "auto":
        fast = fast_on_cpu() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def fast_on_cpu() -> bool:
    """Whether this CPU has native bfloat16 products: AMX tiles or AVX-512 bf16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
