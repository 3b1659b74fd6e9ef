"""A plan on paper against what processes hold, and against sums done by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import worlds
from bytelm.cli import run as cli
from bytelm.errors import ConfigError, UsageError
from bytelm.interfaces.objective import score
from bytelm.training import plan as planning
from bytelm.training.config import ParallelConfig
from bytelm.training.dist import init_distributed
from bytelm.training.limits import limits
from bytelm.training.plan import GPUS, Layout, Shapes, held, layout, plan, shared_out, traffic, units_of
from bytelm.training.settings import configure
from bytelm.units import show_bytes
from small import BLT
from trainable import made

BLT_1B = configure("blt-1b")


# --- against processes --------------------------------------------------------------------------------------------


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def measured(preset: str, sets: list[str]) -> dict[str, int]:
    """Bytes of weights, gradients and moments in this process after a step under FSDP2, tables left out."""
    model, _ = made(preset, *sets, "train.precision=float32")
    tables = {table.weight for table in model.lookup_tables()}
    plain = {p for p in model.parameters() if not p.requires_grad or p in tables}
    with init_distributed(0.5) as dist:
        if dist.world > 1:
            mesh = init_device_mesh("cpu", (dist.world,))
            for unit in [*units_of(model), model]:
                fully_shard(unit, mesh=mesh, ignored_params=plain)  # pyright: ignore[reportArgumentType]
        own = [p for p in model.parameters() if p.requires_grad and p not in plain]
        optimizer = torch.optim.AdamW(own)
        ids = torch.randint(0, 256, (2, 65), generator=torch.Generator().manual_seed(dist.rank))
        opens = torch.arange(65).expand(2, -1) % 5 == 0
        score(model, ids, boundaries=opens if model.patcher else None)[0].backward()
        optimizer.step()
        moments = [m for p in own for key, m in optimizer.state[p].items() if key != "step"]
        frozen = sum(p.nbytes for p in plain if not p.requires_grad)
        return {
            "weights": frozen + sum(local(p).nbytes for p in own),
            "gradients": sum(local(p.grad).nbytes for p in own if p.grad is not None),
            "moments": sum(local(m).nbytes for m in moments),
        }


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("preset", "sets"),
    [("byte-tiny", []), ("demo", BLT), pytest.param("megabyte-tiny", [], marks=pytest.mark.slow)],
    ids=["byte", "blt", "megabyte"],
)
def test_what_a_plan_says_is_held_is_held(world: int, preset: str, sets: list[str]) -> None:
    """By the fullest process to the byte; no process holds more, and the mean is within a tenth."""
    model, train = made(preset, *sets, "train.precision=float32")
    said = {name: size for name, size in held(model, train, Layout(world)).items() if name != "tables"}
    found = worlds.run(world, measured, preset, sets)
    assert found[0] == said
    assert all(each[name] <= said[name] for each in found for name in said)
    assert sum(sum(each.values()) for each in found) / world == pytest.approx(sum(said.values()), rel=0.1)


def test_tables_are_shared_by_rows_with_their_moments() -> None:
    model, train = made("demo", *BLT)
    (table,) = model.lookup_tables()
    rows, width = table.weight.shape
    assert held(model, train, Layout(5))["tables"] == 2 * 4 * -(-rows // 5) * width
    assert held(model, train, Layout(5, tables="replicated"))["tables"] == 2 * 4 * rows * width
    rowwise = replace(train, table_optimizer="rowwise_adam")
    assert held(model, rowwise, Layout(2, 2))["tables"] == 4 * -(-rows // 4) * (width + 1)


def test_a_replica_holds_what_its_shard_does() -> None:
    model, train = made("byte-tiny")
    assert held(model, train, Layout(2, 4)) == held(model, train, Layout(2))


# --- against sums done by hand ------------------------------------------------------------------------------------

SHAPES = Shapes(units=(100, 100), root=50, frozen=0, rows=1000, width=8, lookups=2)


def test_the_traffic_of_a_step() -> None:
    found = traffic(SHAPES, GPUS["h100"], Layout(4), bytes=100, passes=3, number=2)
    gathered, reduced = 3 * 2 * (2 * 200 + 50) * 3 / 4, 4 * 250 * 3 / 4
    assert found.dense == gathered + reduced
    assert found.tables == 3 * (100 * 2 * 0.53) * 3 / 4 * (8 + 8 * 8)
    assert found.dense_seconds == pytest.approx((gathered + reduced) / 360e9 + found.latency)
    each = traffic(SHAPES, GPUS["h100"], Layout(4, sync_each_batch=True), bytes=100, passes=3, number=2)
    assert each.dense == gathered + 3 * reduced
    two = traffic(SHAPES, GPUS["h100"], Layout(2, 2), bytes=100, passes=1, number=4)
    assert two.dense == 4 * 450 / 2 + 4 * 250 / 2 + 2 * 4 * 250 / 2 / 2
    alone = traffic(SHAPES, GPUS["h100"], Layout(1), bytes=100, passes=1, number=4)
    assert alone.dense == alone.tables == alone.dense_seconds == alone.tables_seconds == 0


def test_replicated_tables_get_the_rows_of_all() -> None:
    found = traffic(SHAPES, GPUS["h100"], Layout(4, tables="replicated"), bytes=100, passes=3, number=2)
    assert found.tables == pytest.approx((300 * 2 * 0.53) * 3 * (8 + 4 * 8))


def test_links_of_hosts_are_slower_than_inside_one() -> None:
    card = GPUS["h100"]
    assert planning.rate(card, 8) == 0.8 * 450e9
    assert planning.rate(card, 64) == 0.8 * 400e9  # eight network cards together
    assert planning.rate(card, 8, stride=8) == 0.8 * 50e9  # one each
    assert planning.rate(card, 4, stride=2) == 0.8 * 450e9
    assert planning.latency(8) == pytest.approx(7 * 2e-6)
    assert planning.latency(16) == pytest.approx(2 * 10e-6 + 13 * 2e-6)


def test_the_more_bytes_a_pass_reads_the_smaller_the_share_of_different_rows() -> None:
    shape = replace(SHAPES, rows=3_000_012, lookups=6)
    sizes = [1 << power for power in range(10, 26)]
    found = [planning.different(size, shape) for size in sizes]
    assert found == sorted(found) and found[-1] <= shape.rows
    shares = [rows / size / 6 for rows, size in zip(found, sizes, strict=True)]
    assert shares == sorted(shares, reverse=True)
    assert planning.different(1 << 16, shape) == pytest.approx(0.26 * 6 * (1 << 16))


@pytest.mark.parametrize(("world", "found"), [(8, (8, 32)), (64, (1, 32)), (128, (1, 16)), (2048, (1, 1))])
def test_a_step_stays_what_it_is_in_any_world(world: int, found: tuple[int, int]) -> None:
    assert shared_out(BLT_1B.train, world) == found
    assert plan(BLT_1B, "h100", layout(world)).step_bytes == 64 * 32 * 8192


def test_a_step_that_cannot_be_shared_is_refused() -> None:
    for world in (3, 4096):
        with pytest.raises(ConfigError, match=rf"2048 sequences .* cannot be shared by {world} processes"):
            shared_out(BLT_1B.train, world)


def test_layouts() -> None:
    """Those of [parallel]: from more than 64 processes on shards are of one host."""
    assert layout(64) == Layout(64, 1) and layout(512) == Layout(8, 64)
    tables = ParallelConfig(shard=8, tables="replicated", sync_each_batch=True)
    assert layout(64, tables) == Layout(8, 8, "replicated", True)
    with pytest.raises(ConfigError, match="is not the 64 processes there are"):
        layout(64, ParallelConfig(shard=5))
    with pytest.raises(ConfigError, match="must be at least 1"):
        layout(0)


def test_more_gpus_are_faster_and_hold_less() -> None:
    found = [plan(BLT_1B, "h100", layout(world)) for world in (8, 64, 512)]
    assert [p.bytes_per_second for p in found] == sorted(p.bytes_per_second for p in found)
    memories = [plan(BLT_1B, "h100", Layout(world)).memory for world in (8, 64, 512)]
    sharded = [memory.weights + memory.moments + memory.tables for memory in memories]
    assert sharded == sorted(sharded, reverse=True)
    compute = plan(BLT_1B, "h100", layout(8), mfu=0.2).compute
    assert compute == pytest.approx(2 * found[0].compute)


def test_recomputed_stages_cost_a_forward_pass() -> None:
    times: list[float] = []
    for again in (False, "local", "global", True):
        config = configure("blt-1b", sets=[f"train.activation_checkpointing={str(again).lower()}"])
        times.append(plan(config, "h100", layout(8)).compute)
    none, inner, outer, all = times
    assert all == pytest.approx(none * 4 / 3) and none < inner < all and none < outer < all
    assert inner + outer == pytest.approx(none + all)


# --- where it breaks ----------------------------------------------------------------------------------------------


def said(preset: str, found: Layout, *sets: str) -> str:
    config = configure(preset, sets=sets)
    return "\n".join(limits(config, plan(config, "h100", found)))


def test_where_a_plan_breaks() -> None:
    assert "memory: 84.9 GB do not fit into 72 GB: change train.batch, parallel.sync_each_batch" in said(
        "blt-8b", Layout(8)
    )
    assert "memory: " in said("blt-8b", Layout(64, tables="replicated")) and "memory: " not in said(
        "blt-8b", Layout(64)
    )
    assert "latency: " in said("blt-1b", Layout(512)) and "latency: " not in said("blt-1b", Layout(8))
    assert "network: " in said("blt-1b", Layout(512)) and "network: " not in said("blt-1b", Layout(64))
    assert "patches: the process with the most takes 1.33" in said("blt-1b", Layout(512))
    assert "tables: " in said("blt-1b", Layout(512, tables="replicated")) and "tables: " not in said(
        "blt-1b", Layout(64)
    )
    assert "more than 2,048 GPUs" in said("blt-1b", Layout(64))


def test_fewer_passes_are_proposed_only_where_they_fit() -> None:
    text = said("blt-1b", Layout(64))
    assert "passes: --set train.batch=1024 --set train.gradient_accumulation_steps=2 fits" in text
    sets = ["train.batch=1024", "train.gradient_accumulation_steps=2"]
    config = configure("blt-1b", sets=sets)
    found = plan(config, "h100", Layout(64))
    assert found.memory.total < 72e9 and (found.rows, found.passes) == (16, 2)
    assert "passes: " not in said("blt-1b", Layout(64), *sets)


def test_a_batch_that_the_processes_cannot_share_is_said() -> None:
    """The training refuses it, whatever the accumulation."""
    sets = "--set train.batch=128 --set train.gradient_accumulation_steps=16"
    assert f"batch: train.batch = 64 is none for 128 processes: take {sets}" in said("blt-1b", Layout(128))
    assert "batch: " not in said("blt-1b", Layout(64))


# --- the command --------------------------------------------------------------------------------------------------


def test_a_plan_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--preset", "blt-8b", "--dry-run", "--world", "64", "--device", "h100"]
    assert cli(words) == 0
    out = capfd.readouterr().out
    labels = [line[:14].strip() for line in out.splitlines()]
    assert labels[:4] == ["model", "layout", "step", "memory"]
    assert labels[4:11] == ["weights", "gradients", "moments", "tables", "gathered", "activations", "beside"]
    assert labels[11:16] == ["traffic", "time", "speed", "saved", "assumed"] and set(labels[16:]) == {"breaks"}
    assert "64 x h100: shard 64 x replicate 1" in out and "40% of 989T FLOP/s" in out
    assert cli([*words, "--json", "--mfu", "0.5"]) == 0
    found = json.loads(capfd.readouterr().out)
    expected = plan(configure("blt-8b"), "h100", Layout(64), 0.5)
    assert found["seconds"] == expected.seconds and found["memory"]["total"] == expected.memory.total
    assert found["mfu"] == 0.5 and found["limits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "8", "--device", "h100"], "take --dry-run --world N"),
        (["--mfu", "0.3", "--dry-run", "--device", "h100"], "take --dry-run --world N"),
        (["--dry-run", "--world", "8"], "name one with --device a100, h100, h200, b200"),
        (["--dry-run", "--world", "8", "--device", "cpu"], "--device cpu: a plan with --world knows a100"),
        (["--dry-run", "--world", "8", "--device", "h100", "--mfu", "40"], "--mfu 40.0: must be above 0"),
        (["--dry-run", "--world", "7", "--device", "h100"], "cannot be shared by 7 processes"),
    ],
)
def test_a_plan_that_cannot_be_made(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", *words]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unknown_gpu() -> None:
    with pytest.raises(UsageError, match="h100"):
        planning.gpu("v100")


def test_a_plan_needs_no_data_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(["train", "--preset", "demo", "--dry-run", "--world", "2", "--device", "a100", "--json"]) == 0
    assert not list(tmp_path.iterdir())


def row(cells: list[str]) -> str:
    """The plan of a row of the page, formatted as it is there."""
    name, world, (shard, replicate) = cells[0], int(cells[1]), map(int, cells[2].split(" x "))
    passes = int(cells[3].split()[0])
    sets = [f"train.batch={2048 // passes}", f"train.gradient_accumulation_steps={passes}"]
    how = Layout(shard, replicate, sync_each_batch="each reduced" in cells[3])
    found = plan(configure(name, sets=sets), "h100", how)
    kept, sent = found.memory, found.traffic
    shards = kept.weights + kept.gradients + kept.moments
    sizes = (shards, kept.tables, kept.gathered, kept.activations, kept.total)
    days = 1e12 / found.bytes_per_second / 86400
    told = [
        *(name, str(world), f"{shard} x {replicate}"),
        f"{passes} of {found.rows}{', each reduced' if how.sync_each_batch else ''}",
        *map(show_bytes, sizes),
        f"{show_bytes(sent.dense)}, {sent.dense_seconds:.2g} s",
        f"{show_bytes(sent.tables)}, {sent.tables_seconds:.2g} s",
        *(f"{found.compute:.3g} s", f"{found.seconds:.3g} s", f"{show_bytes(found.bytes_per_second)}/s"),
        f"{days:.3g} days",
    ]
    assert how.world == world
    return " | ".join(told)


def test_the_page_has_the_plans() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| blt-")]
    assert len(rows) == 6 and [row(cells) for cells in rows] == [" | ".join(cells) for cells in rows]
