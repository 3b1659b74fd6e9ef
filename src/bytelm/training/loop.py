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
from bytelm.data.mixture import HeldOut
from bytelm.data.sampler import Batch, Sampler, Windows
from bytelm.device import peak_memory
from bytelm.errors import CheckpointError, DivergenceError
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import prepare, scored, with_auxiliary
from bytelm.threads import StepThreads
from bytelm.training import lengths
from bytelm.training.ahead import Ahead
from bytelm.training.checkpointer import Checkpointer
from bytelm.training.config import ParallelConfig, TrainConfig
from bytelm.training.dist import SINGLE_PROCESS, DistContext
from bytelm.training.draw import Drawn, draw, to_tensors
from bytelm.training.journal import Journal
from bytelm.training.memory import give_back_large_blocks, keep_large_blocks, predict, recomputes
from bytelm.training.optimise import Optimizer, learning_rate
from bytelm.training.parallelize import free, gather, sync_gradients
from bytelm.training.spikes import Spikes
from bytelm.training.stop import StopRequest
from bytelm.transfer import to_host
from bytelm.units import bits_per_byte, show_bytes, show_seconds

FETCHED = 8  # batches that are asked of a store at the same time
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
        sampler: Windows,
        run: Path,
        journal: Journal,
        *,
        valid: Sampler | HeldOut | None = None,
        recipe: dict[str, Any] | None = None,
        sample: Callable[[ByteModel], tuple[bytes, bytes]] | None = None,
        dist: DistContext = SINGLE_PROCESS,
        parallel: ParallelConfig | None = None,
    ) -> None:
        self.model, self.config, self.sampler, self.run, self.journal = model, config, sampler, run, journal
        self.dist = dist
        self.valid, self.recipe, self.sample = valid, recipe, sample
        self.precision = precision(config, model.device)
        self.optimizer = Optimizer(model, config, dist)
        self.parallel = parallel or ParallelConfig()
        self.checkpoints = Checkpointer(run, model, self.optimizer, journal, dist, self.parallel.async_checkpoint)
        # On a CPU a thread would cost the step as much as it saves.
        self.ahead = None if model.device.type == "cpu" else Ahead(self.draw, model.device)
        self.fetched: Ahead[Batch] | None = None
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

        Raises DivergenceError after too many consecutive non-finite steps; the progress before them is saved.
        """
        self.resume()
        self.model.train()
        self.baseline = peak_memory(self.model.device)
        valid_due = save_due = time.monotonic()
        valid_due += 60 * self.config.eval_every_minutes
        save_due += 60 * self.config.checkpoint_every_minutes
        self.tally = RunningSums(since=time.monotonic())
        # A store answers late, but many requests at a time.
        self.fetched = Ahead(self.sampler.batch, torch.device("cpu"), FETCHED) if self.sampler.elsewhere else None
        ahead = (self.fetched or contextlib.nullcontext(), self.ahead or contextlib.nullcontext())
        with StopRequest() as stop, ahead[0], ahead[1]:
            valid = save = False
            while True:
                heard, (valid, save) = self.dist.agreed(stop.received, valid, save)
                if valid and heard is None:
                    self.validate(stop)
                    valid_due = time.monotonic() + 60 * self.config.eval_every_minutes
                if save and heard is None:
                    self.save()
                    save_due = time.monotonic() + 60 * self.config.checkpoint_every_minutes
                if heard is not None or self.budget_fraction() >= 1:
                    break
                with self.threads.step(), self.dist.answering():
                    self.step()
                now = time.monotonic()
                valid = now >= valid_due and self.budget_fraction() < 0.95  # the last validation is at the end
                save = now >= save_due
            if self.budget_fraction() >= 1:
                self.validate(stop)
            self.save(last=True)
            return Outcome(self.progress, self.dist.agreed(stop.received)[0])

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
        found, own = list[Tensor](), 0  # patches that the model itself cuts
        for number, batch in enumerate(drawn.batches, 1):
            sync_gradients(self.model, self.parallel.sync_each_batch or number == len(drawn.batches))
            with self.autocast():
                summed, _ = scored(self.model, batch)
            (with_auxiliary(self.model, summed) / max(1, symbols)).backward()
            found.append(summed.detach())
            if (chunking := self.model.chunking) is not None:
                learned, sizes = lengths.learned(batch.ids, chunking.opens)
                own += learned
                self.tally.lengths += sizes
        self.optimizer.share()
        *parts, norm = numbers([*found, self.optimizer.norm()])  # the only synchronization
        nats, learned = self.dist.total(added(parts), own)
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
        self.log_step(skip_reason, nats, bytes, patches + int(learned), rate, norm)

    def draw(self, step: int) -> Drawn:
        """The inputs of a step that depend on the data alone, not on the weights."""
        batch = self.fetched.take if self.fetched else self.sampler.batch
        return draw(self.model, batch, step, self.config.gradient_accumulation_steps)

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
                self.save(last=True)
                raise DivergenceError(
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
        epoch = self.sampler.epoch_of(max(0, self.progress.step - 1) * self.config.gradient_accumulation_steps)
        return (
            f"step {self.progress.step} | {bpb:.3f} bits/byte | {show_bytes(speed)}/s{patch} "
            f"| processed {show_bytes(self.progress.bytes)}{f' (epoch {epoch + 1})' if epoch else ''} "
            f"| ETA {show_seconds(left)}"
        )

    # --- now and then -------------------------------------------------------------------------------------------------

    def validate(self, stop: StopRequest) -> None:
        """Evaluate the same validation windows each time, and log a generated sample.

        An interrupted validation logs nothing; it is repeated by the session that resumes.
        """
        progress, began = dataclasses.asdict(self.progress), time.monotonic()
        self.model.eval()
        valid, each = self.valid, dict[str, float]()
        if isinstance(valid, HeldOut):
            found, each = valid.mean(lambda windows: self.validation(windows, stop))
        else:
            found = None if valid is None else self.validation(valid, stop)
        if found is not None:
            self.journal.write("validation", **progress, bits_per_byte=found, **({"sources": each} if each else {}))
            named = "".join(f", {name} {bits:.3f}" for name, bits in each.items())
            self.journal.say(f"step {self.progress.step}: validation {found:.3f} bits/byte{named}")
        if self.sample is not None and self.dist.agreed(stop.received)[0] is None:
            gather(self.model)
            with self.dist.answering():
                prompt, text = self.sample(self.model)
            shown = {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}
            self.journal.write("sample", **progress, **shown)
        free(self.model)
        self.model.train()
        duration = time.monotonic() - began
        self.journal.write("phase", **progress, name="validation", duration=duration)
        self.tally.since += duration  # not counted in the training throughput

    def validation(self, valid: Sampler, stop: StopRequest) -> float | None:
        """Bits per byte of the validation windows; None if it is interrupted.

        Several processes take the batches in turn, as many each: those with none left take the last one again, for the
        others' sake. So the windows, and the order of their sum, are those of one process.
        """
        batches, bytes = 0, 0
        while batches < valid.windows and bytes < self.config.eval_bytes:
            bytes += int(self.model.byte_lengths(to_tensors(valid.batch(batches))[0][:, 1:]).sum())
            batches += 1
        nats = list[float]()
        for first in range(0, batches, self.dist.world):
            ids, boundaries = to_tensors(valid.batch(min(first + self.dist.rank, batches - 1)))
            with torch.no_grad(), self.autocast(), self.threads.step(0), self.dist.answering():
                summed, _ = scored(self.model, prepare(self.model, ids, boundaries=boundaries))
            nats += self.dist.everyones(summed.detach()[None].cpu()).tolist()
            if self.dist.agreed(stop.received)[0] is not None:
                return None
        return bits_per_byte(added(nats[:batches]), bytes)

    def save(self, last: bool = False) -> None:
        """Have a checkpoint of the current step written, and log its time and memory; the `last` is waited for.

        Warns once if the disk has no room for two more.
        """
        progress, began = dataclasses.asdict(self.progress), time.monotonic()
        state = {**progress, "recipe": self.recipe, "context": self.config.context_length, "spikes": self.spikes.state}
        state |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "world": self.dist.world}
        state["precision"] = str(self.precision)
        path = self.checkpoints.save(self.progress.step, state)
        path = self.checkpoints.wait() if last and path is None else path
        self.journal.write("phase", **progress, name="saving", duration=time.monotonic() - began)
        low = self.precision == torch.bfloat16 and self.dist.world == 1
        device = self.model.device
        predicted = predict(self.model, self.config, self.mean_patch, device).peak if low else None
        memory = {"peak": peak_memory(device), "baseline": self.baseline, "predicted": predicted}
        self.journal.write("memory", **progress, **memory)
        if not self.dist.is_main_process:
            return
        path = path or next(reversed(store.checkpoints(self.run)), None)  # the one before one that is still written
        if path is None:
            return
        size, room = sum(file.stat().st_size for file in path.iterdir()), shutil.disk_usage(path).free
        if room < 2 * size and not self.warned:
            self.warned = True
            self.journal.say(
                f"the disk of {self.run} has {show_bytes(room)} free, a checkpoint takes {show_bytes(size)}"
            )

    def resume(self) -> None:
        """Resume from the latest intact checkpoint, if there is one, and report corrupt ones."""
        found = self.checkpoints.resume()
        if found is None:
            self.journal.truncate_after(0)
            return
        path, state = found
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
