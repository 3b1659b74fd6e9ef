"""Where a plan breaks (`training.plan`), and the plan in lines."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from bytelm.training.config import RunConfig
from bytelm.training.plan import FILLED, GPUS, LINK, PER_HOST, Gpu, Plan, plan
from bytelm.units import show_bytes, show_count


def fits(found: Plan) -> bool:
    """Whether a step fits into the memory of a GPU."""
    return found.memory.total <= FILLED * GPUS[found.device].memory


def roomier(config: RunConfig, found: Plan) -> Plan | None:
    """The same step in the fewest passes that fit into memory, if they are fewer: each gathers all weights again."""
    sequences = found.rows * found.passes
    for passes in range(1, found.passes):
        if sequences % passes == 0:
            train = replace(
                config.train, batch=sequences // passes * found.layout.world, gradient_accumulation_steps=passes
            )
            other = plan(replace(config, train=train), found.device, found.layout, found.mfu)
            if fits(other):
                return other
    return None


def limits(config: RunConfig, found: Plan) -> list[str]:
    """Where a plan breaks or loses more than a tenth of a step, with the setting to change."""
    layout, kept, sent, said = found.layout, found.memory, found.traffic, list[str]()
    if not fits(found):
        ways = [
            *(["train.batch"] if found.rows > 1 else []),
            *(["parallel.sync_each_batch=true"] if found.passes > 1 and not layout.sync_each_batch else []),
            *(["parallel.tables=sharded"] if layout.tables == "replicated" and found.tables else []),
            *(["a larger parallel.shard"] if layout.replicate > 1 else []),
            "more GPUs",
        ]
        room = show_bytes(FILLED * GPUS[found.device].memory)
        said.append(f"memory: {show_bytes(kept.total)} do not fit into {room}: change {', '.join(ways)}")
    if config.train.batch % layout.world:
        sets = f"--set train.batch={found.rows * layout.world} --set train.gradient_accumulation_steps={found.passes}"
        said.append(f"batch: train.batch = {config.train.batch} is none for {layout.world} processes: take {sets}")
    if sent.dense_seconds > found.compute * found.uneven:
        said.append(f"network: {sent.dense_seconds:.3g} s of traffic are not hidden behind {found.compute:.3g} s")
    if sent.latency > 0.1 * found.compute:
        smaller = f": take parallel.shard={PER_HOST}" if layout.shard > PER_HOST else ""
        said.append(f"latency: {sent.latency:.3g} s of collectives, whatever their size{smaller}")
    if sent.tables_seconds > 0.1 * found.seconds:
        said.append(f"tables: their rows take {sent.tables_seconds:.3g} s")
    if found.uneven > 1.1:
        said.append(
            f"patches: the process with the most takes {found.uneven:.2f} times the mean: more sequences per pass"
        )
    if other := roomier(config, found):
        sets = f"--set train.batch={other.rows * layout.world} --set train.gradient_accumulation_steps={other.passes}"
        said.append(f"passes: {sets} fits, and takes {other.seconds:.3g} s per step")
    sequences = found.rows * found.passes * layout.world
    said.append(f"world: a step of {sequences:,} sequences has none for more than {sequences:,} GPUs")
    return said


def lines(config: RunConfig, found: Plan) -> list[tuple[str, str]]:
    """A plan as (label, value) lines."""
    layout, kept, sent, card = found.layout, found.memory, found.traffic, GPUS[found.device]
    whole = f", of them {show_count(found.tables)} in n-gram tables, {layout.tables}" if found.tables else ""
    parts = {name: size for name, size in asdict(kept).items() if size}
    passes = f"{found.passes} {'pass' if found.passes == 1 else 'passes'} of {found.rows}"
    moved = f"{show_bytes(sent.dense)} in {sent.dense_seconds:.3g} s"
    rows = f", rows of tables {show_bytes(sent.tables)} in {sent.tables_seconds:.3g} s" if found.tables else ""
    terabyte = 1e12 / found.bytes_per_second / 86400
    return [
        ("model", f"{found.model}, {show_count(found.parameters)} parameters{whole}"),
        ("layout", f"{layout.world} x {found.device}: shard {layout.shard} x replicate {layout.replicate}"),
        ("step", f"{show_bytes(found.step_bytes)}; per GPU {passes} sequences of {config.train.context_length:,} ids"),
        ("memory", f"{show_bytes(kept.total)} of {show_bytes(card.memory)} per GPU"),
        *((f"  {name}", show_bytes(size)) for name, size in parts.items()),
        ("traffic", f"per GPU and step: weights and gradients {moved}{rows}"),
        (
            "time",
            f"{found.seconds:.3g} s per step: compute {found.compute:.3g} s, times {found.uneven:.2f} for patches",
        ),
        ("speed", f"{show_bytes(found.bytes_per_second)}/s, 1 TB in {terabyte:,.3g} days"),
        ("saved", f"{show_bytes(found.checkpoint)}, {show_bytes(found.checkpoint / layout.world)} per process"),
        ("assumed", f"{found.mfu:.0%} of {show_count(card.flops)} FLOP/s (--mfu), {LINK:.0%} of {links(card)}"),
        *(("breaks", said) for said in limits(config, found)),
    ]


def links(card: Gpu) -> str:
    """The links of a GPU in words."""
    return f"{show_bytes(card.nvlink)}/s NVLink and {show_bytes(card.nic)}/s between hosts of {PER_HOST}"


def mapping(config: RunConfig, found: Plan) -> dict[str, Any]:
    """A plan as plain JSON."""
    more = {"seconds": found.seconds, "bytes_per_second": found.bytes_per_second, "limits": limits(config, found)}
    return {**asdict(found), **more, "memory": {**asdict(found.memory), "total": found.memory.total}}
