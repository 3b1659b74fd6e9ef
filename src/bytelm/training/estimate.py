"""Estimate of a training's cost: memory, FLOPs, time and disk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bytelm import machine
from bytelm.checkpoint.store import KEEP
from bytelm.data import hub
from bytelm.data.corpora import paths_by_source
from bytelm.data.corpus import INDEX
from bytelm.data.mixture import Share
from bytelm.data.pack import bytes_needed
from bytelm.data.packed import is_pack, pack_of
from bytelm.data.sources import STDIN
from bytelm.device import fitting, memory, resolve
from bytelm.errors import ResourceError
from bytelm.evaluate.costs import counted, usual_mean
from bytelm.find import name_of
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.training.config import RunConfig, TrainConfig
from bytelm.training.dist import launched
from bytelm.training.loop import precision
from bytelm.training.memory import predict, table_moments
from bytelm.training.optimise import Optimizer
from bytelm.training.plan import Layout
from bytelm.training.plan import memory as of_process
from bytelm.training.stages.entropy_model import COUNTED
from bytelm.units import BYTES, show_bytes, show_count, show_seconds

PROBES = 3  # steps by which a model's speed is measured
EPOCHS = 4  # at most: further epochs add little (Muennighoff et al. 2023, arXiv 2305.16264)
ONCE = 1  # epochs of a model with n-gram tables: a second one makes held-out bytes cost more (docs/laws.md)
TRAINING = 3  # cost of a step in forward passes: backward = 2x forward
BESIDE = 1 << 30  # bytes for Python, torch and the C library's cache: 0.4 to 1 GB were measured
STORED = 12  # bytes of a checkpoint for each parameter but those of tables: itself and two moments, in float32
PROBED = 1 << 38  # operations of a probe at the most, so that a large model is timed on a row of its batch
PROBED_ON_DEVICE = 1 << 44  # and on a GPU: a second of a small one, a tenth of that on a large one


@dataclass(frozen=True)
class Needs:
    """Resources that a training needs, in bytes."""

    memory: int
    """For a step of training."""
    counting: int
    """For training the n-gram entropy model; 0 without one."""
    free_memory: int
    """Of the device that trains."""
    free_host: int
    """Of main memory, where n-grams are counted."""
    data: int | None
    """The packed corpus; None where it comes from standard input or from elsewhere and has no size yet."""
    checkpoints: int
    free_disk: int
    host: int = 0
    """Main memory for n-gram tables and their moments, where the rest is on a device; else 0."""

    @property
    def disk(self) -> int:
        """Everything that the run will write, as far as known."""
        return (self.data or 0) + self.checkpoints


@dataclass(frozen=True)
class Estimate:
    """The cost of a training. Speed is measured with a few steps on this machine; the rest is counted."""

    needs: Needs
    model: str
    parameters: int
    tables: int
    precision: str
    flops_per_byte: float
    """Of a step of training: three forward passes."""
    step_bytes: int
    bytes_per_second: float
    entropy_model_seconds: float
    seconds: float
    """Of the training itself."""
    bytes: int
    """That it is trained on."""

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return max(1, round(self.bytes / self.step_bytes))

    @property
    def flops(self) -> float:
        """Operations of the whole training."""
        return self.flops_per_byte * self.bytes


def needs(paths: Sequence[str | Path], config: RunConfig, run: Path, exclude: Sequence[Path] = ()) -> Needs:
    """Needed resources, from shapes and sizes alone. Raises DataError for paths that are not there."""
    model = config.recipe.build_for_counting()
    tables = {id(table.weight) for table in model.lookup_tables()}
    stored = sum(
        4 * p.numel() + table_moments(p, config.train)
        if id(p) in tables
        else (STORED if p.requires_grad else 4) * p.numel()
        for p in model.parameters()
    )
    size = to_be_packed(paths, run, exclude, config.shares)
    device = resolve(config.train.device)
    entropy_model = (
        config.entropy_model if config.recipe.uses_entropy_model and config.init_from is None and size != 0 else None
    )
    counting = 0 if entropy_model is None else entropy_model.counting(min(COUNTED, size or 0))
    step, host = taken(model, config, device)
    return Needs(
        step,
        counting and counting + BESIDE,
        memory(device).free,
        machine.memory().free,
        None if size is None else size + size // 8,  # one bit per byte for boundaries
        max(0, (KEEP + 1) * stored - sum(file.stat().st_size for file in (run / "checkpoints").rglob("*.safetensors"))),
        machine.disk(run),
        host,
    )


def taken(model: ByteModel, config: RunConfig, device: torch.device) -> tuple[int, int]:
    """Bytes that a step takes of its device, and of main memory where n-gram tables are there (else 0).

    Of several processes it is what one takes for its rows and its share of the model, as `training.plan` has it; in
    main memory, what all on this machine take. Raises ConfigError for a layout that they do not fit.
    """
    train, parallel, (world, local) = config.train, config.parallel, launched()
    if world == 1:
        step = predict(model, train, usual_mean(config.recipe), device)
        return step.peak + BESIDE, step.host and step.host + BESIDE
    replicate, shard = parallel.layout(world, local)
    layout = Layout(shard, replicate, parallel.tables, parallel.sync_each_batch)
    number = 4 if device.type == "cpu" else precision(train, device).itemsize
    found = of_process(model, config, layout, train.batch // world, train.gradient_accumulation_steps, number)
    size = found.total - found.beside + BESIDE
    if device.type == "cpu":
        return local * size, 0
    return (size - found.tables, local * (found.tables + BESIDE)) if train.tables == "host" else (size, 0)


def to_be_packed(
    paths: Sequence[str | Path], run: Path, exclude: Sequence[Path] = (), shares: Sequence[Share] = ()
) -> int | None:
    """The bytes still to be packed: 0 if done; None if unknown. Raises DataError."""
    if shares:
        wanted = paths_by_source(paths, shares)
        new = [own for name, own in wanted.items() if not (run / "data" / name / INDEX).exists()]
        paths = [path for own in new if not any(map(is_pack, own)) for path in own]
        if not paths:
            return 0
    elif (run / "data" / INDEX).exists() or pack_of(paths, run) is not None:
        return 0
    if any(str(path) == STDIN or hub.is_dataset(str(path)) for path in paths):
        return None
    return bytes_needed(paths, (run, *exclude))


def check(needed: Needs, config: RunConfig, run: Path) -> None:
    """Raises ResourceError, which names the setting to change, for a training that exceeds memory or disk."""
    if needed.memory > needed.free_memory:
        raise ResourceError(
            f"a step takes {show_bytes(needed.memory)} of memory and {show_bytes(needed.free_memory)} are free: "
            f"{suggest_fit(config, needed.free_memory)}, or start anyway with --force"
        )
    if needed.host > needed.free_host:
        raise ResourceError(
            f"n-gram tables on the host take {show_bytes(needed.host)} of memory and {show_bytes(needed.free_host)} "
            "are free: take --set train.table_optimizer=rowwise_adam, fewer model.ngram_rows, or start anyway with "
            "--force"
        )
    if needed.counting > needed.free_host:
        raise ResourceError(
            f"counting n-grams takes {show_bytes(needed.counting)} of memory and {show_bytes(needed.free_host)} are "
            "free: take --set patching.name=space or fewer entropy_model.rows, or start anyway with --force"
        )
    if needed.disk > needed.free_disk:
        raise ResourceError(
            f"{run} will take {show_bytes(needed.disk)} of disk ({show_bytes(needed.data or 0)} of data, "
            f"{show_bytes(needed.checkpoints)} of checkpoints) and {show_bytes(needed.free_disk)} are free: "
            "name another --run, give less data, or start anyway with --force"
        )


def suggest_fit(config: RunConfig, free: int) -> str:
    """The smallest change of a configuration with which a step fits into memory, as command-line options."""
    model, device = config.recipe.build_for_counting(), resolve(config.train.device)
    for changed in smaller(config.train, launched()[0]):
        peak, _ = taken(model, replace(config, train=changed), device)
        if peak <= free:
            names = [
                n
                for n in ("context_length", "batch", "activation_checkpointing")
                if getattr(changed, n) != getattr(config.train, n)
            ]
            sets = " ".join(f"--set train.{n}={str(getattr(changed, n)).lower()}" for n in names)
            return f"{sets} takes {show_bytes(peak)}"
    return "use a smaller --preset (bytelm presets lists their memory)"


def lighter(config: RunConfig) -> str:
    """A change of a configuration whose step did not fit, by which activations take three quarters at the most."""
    model, device, (world, local) = config.recipe.build_for_counting(), resolve(config.train.device), launched()
    rows = replace(config.train, batch=max(1, config.train.batch // world))
    spared = predict(model, rows, usual_mean(config.recipe), device).activations // 4
    return suggest_fit(config, taken(model, config, device)[0] - spared * (local if device.type == "cpu" else 1))


def smaller(train: TrainConfig, world: int = 1) -> Iterator[TrainConfig]:
    """The same training with ever cheaper steps: fewer rows, then activation checkpointing, then shorter windows.

    Rows are a multiple of the `world` processes.
    """
    rows = [train.batch >> halved for halved in range(1, train.batch.bit_length())]
    rows = [batch for batch in rows if batch % world == 0]
    yield from (replace(train, batch=batch) for batch in rows)
    yield replace(train, activation_checkpointing=True)
    yield from (replace(train, batch=batch, activation_checkpointing=True) for batch in rows)
    window = train.context_length // 2
    while window >= 64:
        yield replace(train, batch=world, activation_checkpointing=True, context_length=window)
        window //= 2


def estimate(paths: Sequence[str | Path], config: RunConfig, run: Path) -> Estimate:
    """The cost of a training, its speed measured with a few steps. Raises DataError."""
    model, train = config.recipe.build_for_counting(), config.train
    mean = usual_mean(config.recipe)
    cost = counted(model, train.context_length, mean)
    needed = needs(paths, config, run)
    speed = bytes_per_second(config, mean)
    per_id = mean if model.tokens is not None else 1.0
    step = round(train.context_length * train.batch * train.gradient_accumulation_steps * per_id)
    bytes = round(train.budget.expected_bytes(step, speed))
    return Estimate(
        needs=needed,
        model=name_of(config.model),
        parameters=cost.parameters,
        tables=cost.tables,
        precision=str(precision(train, resolve(train.device))).removeprefix("torch."),
        flops_per_byte=TRAINING * cost.executed,
        step_bytes=step,
        bytes_per_second=speed,
        entropy_model_seconds=entropy_model_seconds(config),
        seconds=bytes / speed,
        bytes=bytes,
    )


def entropy_model_seconds(config: RunConfig) -> float:
    """Training time of a neural entropy model; 0 for counted n-grams, or for that of another run."""
    if (
        not config.entropy_model
        or not config.recipe.uses_entropy_model
        or config.init_from is not None
        or config.entropy_model.counting(1)
    ):
        return 0.0
    model, train = config.entropy_model.build().weights, config.entropy_model_train
    model.init_weights(0)
    speed = timed(model.to(resolve(config.train.device)), train, None)
    return (
        train.budget.expected_bytes(train.context_length * train.batch * train.gradient_accumulation_steps, speed)
        / speed
    )


def bytes_per_second(config: RunConfig, mean: float) -> float:
    """Training throughput in bytes per second on this machine, patches or tokens `mean` bytes long."""
    model = config.recipe.draft().build()
    model.init_weights(0)
    for table in model.lookup_tables():
        table.on_host = config.train.tables == "host"
    device = resolve(config.train.device)
    with fitting(device, "a step", lambda: lighter(config)):
        return timed(model.to(device), config.train, mean) * (mean if model.tokens else 1.0)


def multiplied(device: torch.device) -> float:
    """FLOPs per second of large matrix products on a device, in the default training precision."""
    # Products that fill a GPU, many of them queued before one is waited for; of numbers, as it multiplies ones faster.
    side, queued = (1024, 1) if device.type == "cpu" else (8192, 8)
    a = torch.randn(side, side, device=device, dtype=precision(TrainConfig(), device))
    seconds: list[float] = []
    for _ in range(8):
        began = time.perf_counter()
        _ = float([a @ a for _ in range(queued)][-1][0, 0])
        seconds.append(time.perf_counter() - began)
    return queued * 2 * side**3 / min(seconds)


def timed(model: ByteModel, train: TrainConfig, mean: float | None) -> float:
    """Training throughput in ids per second, from a few steps on random bytes; `mean`: of a patch.

    Gradients of n-gram tables are of the rows that are read, as in training, and these are moved: that takes time by
    ids. What moves the other parameters is left out: it takes time by parameters, and these are few ids.
    """
    model.train()
    optimizer = Optimizer(model, train)
    row = TRAINING * model.flops(train.context_length, round(train.context_length / (mean or 1.0)))
    shape = (
        max(1, min(train.batch, (PROBED if model.device.type == "cpu" else PROBED_ON_DEVICE) // max(1, row))),
        train.context_length,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, BYTES, shape, generator=generator)
    opens = None if mean is None else torch.rand(shape, generator=generator) < 1 / mean
    low = precision(train, model.device) == torch.bfloat16
    seconds: list[float] = []
    for _ in range(PROBES):
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
            nats, _ = score(model, ids, boundaries=opens)
        nats.backward()
        optimizer.norm()
        if optimizer.tables is not None:
            optimizer.tables.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # for the training that follows
    return ids.numel() / min(seconds)


def lines(found: Estimate, run: Path) -> list[tuple[str, str]]:
    """An estimate as (label, value) lines."""
    needed = found.needs
    data = "unknown beforehand" if needed.data is None else show_bytes(needed.data)
    tables = f" ({show_count(found.tables)} in n-gram tables)" if found.tables else ""
    host = f", and {show_bytes(needed.host)} of {show_bytes(needed.free_host)} on the host" if needed.host else ""
    entropy_model = (
        f", after {show_seconds(found.entropy_model_seconds)} for the entropy model"
        if found.entropy_model_seconds
        else ""
    )
    return [
        ("model", f"{found.model}, {show_count(found.parameters)} parameters{tables}, {found.precision}"),
        ("memory", f"{show_bytes(max(needed.memory, needed.counting))} of {show_bytes(needed.free_memory)} free{host}"),
        ("speed", f"{show_bytes(found.bytes_per_second)}/s, measured here"),
        ("steps", f"{found.steps:,} of {show_bytes(found.step_bytes)}: {show_bytes(found.bytes)} total"),
        ("FLOPs", f"{show_count(found.flops_per_byte)} per byte, {found.flops:.2e} total"),
        ("time", f"{show_seconds(found.seconds)}{entropy_model}; without packing and computing patch boundaries"),
        ("disk", f"data {data}, checkpoints {show_bytes(needed.checkpoints)}, of {show_bytes(needed.free_disk)} free"),
        ("run", str(run)),
    ]


def mapping(found: Estimate) -> dict[str, Any]:
    """An estimate as plain JSON."""
    return {**asdict(found), "steps": found.steps, "flops": found.flops}
