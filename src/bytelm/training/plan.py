"""A training on many GPUs, on paper: memory, traffic and time of a step, from shapes alone.

All formulas of sharding are here (docs/scaling.md has them in words); nothing is measured, and no GPU is needed.
Weights, gradients and moments are sharded by FSDP2 over `shard` processes and replicated `replicate` times; n-gram
tables are sharded by rows over all processes. All units are bytes, seconds and operations unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from bytelm.errors import ConfigError, UsageError
from bytelm.evaluate.costs import usual_mean
from bytelm.find import name_of
from bytelm.interfaces.model import ByteModel
from bytelm.training.config import ParallelConfig, RunConfig, TrainConfig
from bytelm.training.memory import predict, recomputes, table_moments

PER_HOST = 8  # GPUs of a host
MFU = 0.4  # of the peak, operations that are computed again included: an assumption
LINK = 0.8  # of the rate of a link: an assumption
NEAR, FAR = 2e-6, 10e-6  # seconds of one hop of a ring, inside a host and between hosts: an assumption
BESIDE = 2 << 30  # of the CUDA context, NCCL's buffers and torch itself: an assumption
BACKWARD = 2  # cost of a backward pass in forward passes
FILLED = 0.9  # of a GPU's memory: the allocator's fragments need the rest
# Different rows among those that so many bytes of one pass look up: measured on code and text, 500,002 rows a table.
DIFFERENT = ((1 << 13, 0.53), (1 << 16, 0.26), (1 << 19, 0.175), (1 << 22, 0.067))
UNEVEN = 0.16  # standard deviation of the patches of a window of 8,192 bytes, over their mean: measured on code


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU in hosts of eight: bfloat16 without sparsity; links in one direction."""

    flops: float
    memory: int
    nvlink: float
    """To the other GPUs of its host."""
    nic: float
    """To other hosts, for each GPU."""


GPUS = {
    "a100": Gpu(312e12, 80 * 10**9, 300e9, 25e9),
    "h100": Gpu(989e12, 80 * 10**9, 450e9, 50e9),
    "h200": Gpu(989e12, 141 * 10**9, 450e9, 50e9),
    "b200": Gpu(2250e12, 180 * 10**9, 900e9, 50e9),
}


@dataclass(frozen=True)
class Layout:
    """How a model is laid out over `shard` x `replicate` processes."""

    shard: int
    replicate: int = 1
    tables: Literal["sharded", "replicated"] = "sharded"
    sync_each_batch: bool = False
    """Whether gradients are reduced after every pass of an accumulation; else each process keeps whole ones."""

    @property
    def world(self) -> int:
        """All processes."""
        return self.shard * self.replicate


@dataclass(frozen=True)
class Shapes:
    """Numbers of a model by how they are sharded."""

    units: tuple[int, ...]
    """Of each FSDP unit but the root."""
    root: int
    """Trainable numbers outside of the units and the tables."""
    frozen: int
    rows: int
    """Of n-gram tables."""
    width: int
    """Of a row."""
    lookups: int
    """Rows that a byte looks up."""

    @property
    def dense(self) -> int:
        """Trainable numbers but those of the tables."""
        return sum(self.units) + self.root


@dataclass(frozen=True)
class PerGpu:
    """Memory of the fullest process in a step."""

    weights: int
    """Its shard in float32, and the frozen entropy model, which every process has whole."""
    gradients: int
    moments: int
    tables: int
    """Its rows of the n-gram tables, their moments, and the gradient of the rows that a step reads."""
    gathered: int
    """Whole weights of the root and of two units, and their gradients on the way to their owners."""
    activations: int
    beside: int = BESIDE

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Traffic:
    """What a process sends in a step, and the seconds that it takes at the assumed rates."""

    dense: float
    tables: float
    dense_seconds: float
    tables_seconds: float
    latency: float
    """Of `dense_seconds`, those that its collectives take whatever their size."""


@dataclass(frozen=True)
class Plan:
    """One step of a training on GPUs of a kind."""

    model: str
    device: str
    layout: Layout
    mfu: float
    parameters: int
    tables: int
    rows: int
    """Sequences of a process in one pass."""
    passes: int
    """Forward passes of a step: gradient accumulation."""
    step_bytes: int
    memory: PerGpu
    traffic: Traffic
    compute: float
    """Seconds at the assumed rate."""
    uneven: float
    """How much longer the process with the most patches computes than the mean."""
    checkpoint: int

    @property
    def seconds(self) -> float:
        """Of a step: dense traffic is hidden behind compute, that of the tables is not."""
        return max(self.compute * self.uneven, self.traffic.dense_seconds) + self.traffic.tables_seconds

    @property
    def bytes_per_second(self) -> float:
        """Training throughput of all processes."""
        return self.step_bytes / self.seconds


def gpu(name: str) -> Gpu:
    """The figures of a GPU by name. Raises UsageError for an unknown one."""
    if name not in GPUS:
        raise UsageError(f"--device {name}: a plan with --world knows {', '.join(GPUS)}: name one of them")
    return GPUS[name]


def layout(world: int, parallel: ParallelConfig | None = None) -> Layout:
    """How so many processes share a training. Raises ConfigError if they cannot be laid out so."""
    if world < 1:
        raise ConfigError(f"--world {world}: must be at least 1")
    parallel = parallel or ParallelConfig()
    replicate, shard = parallel.layout(world, min(world, PER_HOST))
    return Layout(shard, replicate, parallel.tables, parallel.sync_each_batch)


def shapes(model: ByteModel) -> Shapes:
    """The shapes of a model, which may be on the meta device."""
    tables = {id(table.weight): table for table in model.lookup_tables()}
    own = {id(p): p.numel() for p in model.parameters() if p.requires_grad and id(p) not in tables}
    units = tuple(sum(own[id(p)] for p in unit.parameters()) for unit in units_of(model))
    rows = sum(len(table.weight) for table in tables.values())
    return Shapes(
        units=units,
        root=sum(own.values()) - sum(units),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        rows=rows,
        width=max((table.weight.shape[1] for table in tables.values()), default=0),
        lookups=sum(table.lookups for table in tables.values()),
    )


def units_of(model: ByteModel) -> list[torch.nn.Module]:
    """The modules that are gathered one by one: all layers but those that are entered once for each patch."""
    return [block for stage in model.stages(1, 1) if stage.apart is None for block in stage.stack.blocks]


def fullest(parameters: Sequence[Tensor], processes: int) -> int:
    """Numbers of the fullest of some processes: FSDP2 shards each parameter's first dimension, rounded up."""
    return sum(-(-p.shape[0] // processes) * (p.numel() // p.shape[0]) if p.ndim else 1 for p in parameters)


def held(model: ByteModel, train: TrainConfig, layout: Layout) -> dict[str, int]:
    """Bytes that the fullest process holds from step to step, and of gradients: weights, gradients, moments, tables."""
    tables = {id(table.weight) for table in model.lookup_tables()}
    own = [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
    dense = fullest(own, layout.shard)
    found = 0
    for table in model.lookup_tables():
        here = layout.world if layout.tables == "sharded" else 1
        mine = -(-len(table.weight) // here)
        found += 4 * mine * table.weight.shape[1] + table_moments(table.weight[:mine], train)
    frozen = 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return {"weights": 4 * dense + frozen, "gradients": 4 * dense, "moments": 8 * dense, "tables": found}


def shared_out(train: TrainConfig, world: int) -> tuple[int, int]:
    """(sequences of a process in one pass, passes of a step): the configured step, in as few rows as the world allows.

    Raises ConfigError if its sequences cannot be shared by so many processes.
    """
    sequences = train.batch * train.gradient_accumulation_steps
    for passes in range(train.gradient_accumulation_steps, 0, -1):
        if sequences % (passes * world) == 0:
            return sequences // passes // world, passes
    raise ConfigError(
        f"a step of {sequences} sequences (train.batch x train.gradient_accumulation_steps) cannot be shared by "
        f"{world} processes: take a multiple of the world size"
    )


def different(bytes: int, shapes: Shapes) -> float:
    """Different rows among those that so many bytes of one pass look up."""
    (low, share), *rest = DIFFERENT
    for high, other in rest:
        if bytes <= low:
            break
        part = min(1.0, (min(bytes, high) - low) / (high - low))
        low, share = high, share + part * (other - share)
        if bytes <= high:
            break
    return min(bytes * shapes.lookups * share, float(shapes.rows))


def memory(model: ByteModel, config: RunConfig, layout: Layout, rows: int, passes: int, number: int) -> PerGpu:
    """Memory of the fullest process; `number`: bytes of a gathered weight."""
    train, shape = config.train, shapes(model)
    state = held(model, train, layout)
    largest = max(shape.units, default=0)
    gathered = sent = 0
    if layout.shard > 1:
        gathered = number * (shape.root + 2 * largest)
        sent = number * (shape.root + largest) + 4 * max(shape.root, largest)
    whole = 4 * shape.dense if passes > 1 and not layout.sync_each_batch and layout.world > 1 else 0
    read = min(passes * different(rows * train.context_length, shape), float(shape.rows))
    owned = min(read, -(-shape.rows // layout.world)) if layout.tables == "sharded" else read
    exchanged = 2 * different(rows * train.context_length, shape) if layout.world > 1 else 0.0
    found = predict(model, replace(train, batch=rows), usual_mean(config.recipe))  # kernels of the GPU are fused, too
    return PerGpu(
        weights=state["weights"],
        gradients=max(state["gradients"], whole),
        moments=state["moments"],
        tables=state["tables"] + round(4 * shape.width * (owned + exchanged)),
        gathered=gathered + sent,
        activations=found.activations,
    )


def rate(device: Gpu, processes: int, stride: int = 1) -> float:
    """Bytes per second that each process of a ring sends; `stride`: between the ranks of neighbours."""
    if processes * stride <= PER_HOST:
        return LINK * device.nvlink
    return LINK * min(device.nvlink, max(1, PER_HOST // stride) * device.nic)


def latency(processes: int, stride: int = 1) -> float:
    """Seconds of one turn of a ring without any bytes."""
    hosts = -(-processes * stride // PER_HOST)
    far = 0 if hosts == 1 else min(processes, hosts)
    return FAR * far + NEAR * max(0, processes - 1 - far)


def traffic(shape: Shapes, device: Gpu, layout: Layout, bytes: int, passes: int, number: int) -> Traffic:
    """What a process sends in a step; `bytes`: that it reads in one pass; `number`: bytes of a gathered weight."""
    shard, replicas, world = layout.shard, layout.replicate, layout.world
    reductions = passes if layout.sync_each_batch else 1
    gathered = passes * number * (2 * sum(shape.units) + shape.root) * (shard - 1) / shard
    reduced = reductions * 4 * shape.dense * (shard - 1) / shard
    summed = reductions * 2 * 4 * (shape.dense / shard) * (replicas - 1) / replicas
    turns = passes * (2 * len(shape.units) + 1) + reductions * (len(shape.units) + 1)
    wait = turns * latency(shard) + 2 * reductions * (len(shape.units) + 1) * latency(replicas, shard)
    seconds = (gathered + reduced) / rate(device, shard) + summed / rate(device, replicas, shard) + wait
    if layout.tables == "sharded":  # an id to its owner, a row back, a gradient to its owner
        rows = passes * different(bytes, shape) * (world - 1) / world
        tables = rows * (8 + 2 * 4 * shape.width)
    else:  # every process gets the rows and the gradients of all
        tables = different(passes * bytes, shape) * (8 + 4 * shape.width) * (world - 1)
    far = max(0, world - PER_HOST) / max(1, world - 1)  # of what is sent to other hosts
    slow = LINK * device.nic if layout.tables == "sharded" else rate(device, world)
    spent = tables * max(far / slow, (1 - far) / (LINK * device.nvlink))
    return Traffic(gathered + reduced + summed, tables, seconds, spent, wait)


def compute(model: ByteModel, train: TrainConfig, mean: float) -> tuple[float, float]:
    """(operations of a training step per id, the share of them that grows with the number of patches)."""
    window = train.context_length
    patches = round(window / mean)
    forward = model.flops(window, patches)
    stages = model.stages(window, patches)
    parts = [stage.stack.config.layers * stage.stack.config.products(stage.positions) for stage in stages]
    again = sum(part for part, stage in zip(parts, stages, strict=True) if recomputes(train, stage.name))
    share = 0.0 if model.patcher is None else 1 - model.flops(window, 1) / forward
    return forward * (1 + BACKWARD + again / max(1, sum(parts))) / window, share


def uneven(layout: Layout, rows: int, share: float) -> float:
    """How much longer the process with the most patches takes: the expected maximum of normal variables."""
    if layout.world == 1:
        return 1.0
    return 1 + share * UNEVEN / rows**0.5 * NormalDist().inv_cdf(0.5264 ** (1 / layout.world))


def plan(config: RunConfig, device: str, layout: Layout, mfu: float = MFU) -> Plan:
    """The plan of a training. Raises UsageError for an unknown GPU, ConfigError for a step that cannot be shared."""
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu {mfu}: must be above 0 and at most 1")
    model, train, card = config.recipe.build_for_counting(), config.train, gpu(device)
    mean = usual_mean(config.recipe)
    rows, passes = shared_out(train, layout.world)
    number = 4 if train.precision == "float32" else 2
    shape = shapes(model)
    ids = rows * train.context_length
    operations, share = compute(model, train, mean)
    per_id = mean if model.tokens is not None else 1.0
    tables = sum(table_moments(table.weight, train) + 4 * table.weight.numel() for table in model.lookup_tables())
    return Plan(
        model=name_of(config.model),
        device=device,
        layout=layout,
        mfu=mfu,
        parameters=shape.dense + shape.rows * shape.width,
        tables=shape.rows * shape.width,
        rows=rows,
        passes=passes,
        step_bytes=round(ids * passes * layout.world * per_id),
        memory=memory(model, config, layout, rows, passes, number),
        traffic=traffic(shape, card, layout, ids, passes, number),
        compute=ids * passes * operations / (mfu * card.flops),
        uneven=uneven(layout, rows, share),
        checkpoint=12 * shape.dense + 4 * shape.frozen + tables,
    )
