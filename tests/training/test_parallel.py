"""A model that several processes share learns what one process does: every architecture, by 2, and by 2 times 2."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import worlds
from bytelm.data.sampler import Batch, Sampler
from bytelm.errors import CheckpointError, ConfigError, ResourceError
from bytelm.find import names
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score, scored
from bytelm.nn.rows import RowGradients
from bytelm.nn.sharded import ShardedRows, empty_rows, rows_here
from bytelm.patching.base import Patcher
from bytelm.testing.tiny import shapes, tiny_patchers
from bytelm.training import estimate, plan
from bytelm.training.config import ParallelConfig, TrainConfig
from bytelm.training.dist import SINGLE_PROCESS, DistContext, init_distributed
from bytelm.training.journal import Journal
from bytelm.training.loop import Trainer
from bytelm.training.parallelize import gather, parallelize
from bytelm.training.plan import Layout
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.stop import StopRequest
from bytelm.transfer import HOST
from bytelm.units import BOS, EOS, PAD

BATCH, STEPS, LENGTH = 8, 3, 40
CONFIG = TrainConfig(steps=STEPS, batch=BATCH, context_length=LENGTH, gradient_accumulation_steps=2, warmup_steps=1)
CONFIG = replace(CONFIG, precision="float32", max_grad_norm=0.5, spikes="keep")


class Windows(Sampler):
    """Documents of every length, one of them a window that is nearly empty, in patches of about three bytes."""

    elsewhere = False

    def __init__(self, patched: bool, dist: DistContext, valid: bool = False) -> None:
        self.patched, self.dist, self.rows, self.windows = patched, dist, BATCH // dist.world, 5
        if valid:
            self.rows, self.dist = 2, SINGLE_PROCESS

    def epoch_of(self, step: int) -> int:
        return 0

    def batch(self, step: int) -> Batch:
        lines = [self.line((step * self.dist.world + self.dist.rank) * self.rows + row) for row in range(self.rows)]
        ids, opens = (np.stack(part) for part in zip(*lines, strict=True))
        return Batch(ids, opens if self.patched else None)

    def line(self, sample: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(sample)
        ids = rng.integers(97, 107, LENGTH + 1)
        starts = rng.integers(1, LENGTH, 2)
        ids[starts], ids[starts - 1], ids[0] = BOS, EOS, BOS
        opens = rng.random(LENGTH + 1) < 0.3
        if sample % 5 == 0:
            ids[3:] = PAD
        return ids, (opens | (ids == BOS) | (ids == EOS)) & (ids != PAD)


@cache
def kinds() -> dict[str, tuple[Any, Patcher | None]]:
    """Every small shape of every architecture, and what it is built around."""
    patchers = [patcher for _, patcher in tiny_patchers()]
    found: dict[str, tuple[Any, Patcher | None]] = {}
    for name in names("models"):
        for number, (shape, config) in enumerate(shapes("models", name)):
            found[f"{name}{shape}"] = config, patchers[-1 - number % len(patchers)] if config.patched else None
    return found


def begun(kind: str, dist: DistContext, parallel: ParallelConfig, train: TrainConfig = CONFIG) -> ByteModel:
    config, patcher = kinds()[kind]
    around = [] if patcher is None else [patcher]
    if dist.world == 1:
        model = config.build(*around)
    else:
        with torch.device("meta"):
            model = config.build(*around)
        parallelize(model, dist, parallel, HOST)
    model.init_weights(3)
    if model.tokens is not None:
        model.take_tokens(model.tokens)
    return model


def trainer(
    kind: str, dist: DistContext, parallel: ParallelConfig, train: TrainConfig = CONFIG, run: Path = Path()
) -> Trainer:
    patched = kinds()[kind][0].patched
    journal = Journal(None, quiet=True, mute=True)
    windows, valid = Windows(patched, dist), Windows(patched, dist, valid=True)
    model = begun(kind, dist, parallel)
    return Trainer(model, train, windows, run, journal, valid=valid, dist=dist, parallel=parallel)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in model.state_dict().items()}


def judgements(made: Trainer) -> list[float]:
    """Where nats and norms of its steps will be noted."""
    found, skip_reason = list[float](), made.skip_reason

    def judge(nats: float, bytes: int, norm: float) -> str | None:
        found.extend([nats, norm])
        return skip_reason(nats, bytes, norm)

    made.skip_reason = judge  # type: ignore[method-assign]
    return found


@dataclass
class Learnt:
    """What a process found of a training."""

    judged: list[float]
    bits: float | None
    weights: dict[str, Tensor]
    written: bytes


def learnt(kind: str, dist: DistContext, parallel: ParallelConfig, train: TrainConfig) -> Learnt:
    found = trainer(kind, dist, parallel, train)
    judged = judgements(found)
    found.model.train()
    for _ in range(STEPS):
        found.step()
    found.model.eval()
    assert found.valid is not None
    bits = found.validation(found.valid, StopRequest())
    gather(found.model)
    written = generate(found.model, [b"abc"], max_bytes=12, sampling=Sampling(), seed=0)[0].data
    return Learnt(judged, bits, whole(found.model), written)


def all_learnt(parallel: ParallelConfig, train: TrainConfig, beginning: str = "") -> dict[str, Learnt]:
    with init_distributed(0.5) as dist:
        return {kind: learnt(kind, dist, parallel, train) for kind in kinds() if kind.startswith(beginning)}


def check_equal(found: dict[str, Learnt], alone: dict[str, Learnt]) -> None:
    for kind, shared in found.items():
        own = alone[kind]
        assert shared.judged == pytest.approx(own.judged, rel=2e-4), kind
        assert shared.bits == pytest.approx(own.bits, rel=2e-5), kind
        assert shared.written == own.written, kind
        assert shared.weights.keys() == own.weights.keys()
        for name, tensor in own.weights.items():
            torch.testing.assert_close(shared.weights[name], tensor, rtol=2e-3, atol=2e-4, msg=f"{kind} {name}")


@pytest.fixture(scope="module")
def alone() -> dict[str, Learnt]:
    return all_learnt(ParallelConfig(), CONFIG)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, ParallelConfig()), pytest.param(4, ParallelConfig(replicate=2), marks=pytest.mark.slow)],
    ids=["2", "2 times 2"],
)
def test_every_architecture_learns_what_one_process_does(
    alone: dict[str, Learnt], world: int, parallel: ParallelConfig
) -> None:
    for found in worlds.run(world, all_learnt, parallel, CONFIG):
        assert found.keys() == alone.keys()
        check_equal(found, alone)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_other_ways_to_share_learn_the_same(alone: dict[str, Learnt], world: int) -> None:
    """Tables that each process holds whole, gradients reduced after every micro-batch, layers computed again."""
    parallel = ParallelConfig(tables="replicated", sync_each_batch=True, shard=2)
    for found in worlds.run(world, all_learnt, parallel, replace(CONFIG, activation_checkpointing=True), "blt (last"):
        assert len(found) == 1
        check_equal(found, alone)


def spoilt(table: bool) -> tuple[bool, int, bool]:
    """Whether the norm is NaN, how many steps were skipped, and whether weights are as before.

    One process finds a gradient that is not finite, of what is dense or of a table.
    """
    with init_distributed(0.5) as dist:
        made = trainer("blt (last layer crossed)", dist, ParallelConfig())
        before = whole(made.model)
        if dist.rank == 1:
            which: Tensor = made.model.lookup_tables()[0].held
            if table:
                which.register_hook(lambda gradient: gradient * math.nan)
            else:
                made.model.get_submodule("decoder.norm").register_forward_hook(lambda *found: Spoilt.apply(found[2]))
        judged = judgements(made)
        made.model.train()
        made.step()
        same = all(torch.equal(before[name], tensor) for name, tensor in whole(made.model).items())
    return math.isnan(judged[1]), made.progress.skipped, same


class Spoilt(Function):
    """The same, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        return d_out * math.nan


@pytest.mark.parametrize("table", [False, True], ids=["of what is dense", "of a table"])
def test_a_gradient_of_one_process_that_is_not_finite_has_all_skip_the_step(table: bool) -> None:
    assert worlds.run(2, spoilt, table) == [(True, 1, True)] * 2


def poisoned(run: Path) -> str:
    """What resuming says of a checkpoint in which the share of one process has a NaN."""
    with init_distributed(0.5) as dist:
        made = trainer("transformer (full)", dist, ParallelConfig(async_checkpoint=False), run=run)
        if dist.rank == 1:
            rows_here(made.model.get_parameter("head.weight").detach())[1][0, 0] = math.nan
        made.checkpoints.save(1, {})
        with pytest.raises(CheckpointError) as caught:
            made.checkpoints.resume()
    return str(caught.value)


def test_weights_that_are_not_finite_in_one_share_are_refused_by_all(tmp_path: Path) -> None:
    first, second = worlds.run(2, poisoned, tmp_path)
    assert "not finite  in the share of another process" in first
    assert "not finite  head.weight  NaN or Inf in 1 of" in second


def entered() -> dict[str, tuple[list[int], list[int]]]:
    """Of each architecture, the units that a pass entered, in order, and how many it has."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    with init_distributed(0.5) as dist:
        for kind in kinds():
            made = trainer(kind, dist, ParallelConfig())
            seen, units = list[int](), made.model.units()
            for number, unit in enumerate(units):
                unit.register_forward_pre_hook(lambda *_, seen=seen, number=number: seen.append(number))
            made.model.train()
            for batch in made.draw(dist.rank).batches[:1]:
                scored(made.model, batch)
            ids = torch.full((1, 5), PAD)
            ids[0, 0] = BOS  # a window with nothing in it
            opens = (ids == BOS) if kinds()[kind][0].patched else None
            score(made.model, ids, boundaries=opens)
            found[kind] = seen, list(range(len(units)))
    return found


def test_every_pass_enters_the_same_units_in_one_order_whatever_the_ids() -> None:
    first, second = worlds.run(2, entered)
    for kind, (seen, units) in first.items():
        half = len(seen) // 2
        assert sorted(set(seen[:half])) == units and units, kind
        assert seen[:half] == seen[half:] == second[kind][0][half:] == second[kind][0][:half], kind


def trained_bytes(made: Trainer) -> int:
    """Bytes that this process holds of what is trained: weights, gradients and moments."""
    found = 0
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            leaf = made.optimizer.held.get(id(parameter), parameter)
            grad = leaf.grad if leaf.grad is None or not leaf.grad.is_sparse else leaf.grad._values()
            moments = (x for x in made.optimizer.moments(parameter).values() if isinstance(x, Tensor))
            found += sum(rows_here(x)[1].nbytes for x in (leaf, grad, *moments) if x is not None)
    return found


def held(kind: str) -> int:
    with init_distributed(0.5) as dist:
        made, found = trainer(kind, dist, ParallelConfig()), list[int]()
        made.optimizer.zero_grad = lambda: found.append(trained_bytes(made))  # type: ignore[method-assign]
        made.model.train()
        made.step()
    return found[0]


@pytest.mark.parametrize(
    "kind", ["blt (last layer crossed)", pytest.param("megabyte (two stages)", marks=pytest.mark.slow)]
)
def test_four_processes_each_hold_a_quarter_of_what_is_trained(kind: str) -> None:
    alone = held(kind)
    assert all(found <= 0.30 * alone for found in worlds.run(4, held, kind))


ROWS, DIM = 11, 4


def exchanged(sparse: bool) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Sums looked up, the gradient of the rows held, these rows, and the counts; the last process looks up nothing."""
    with init_distributed(0.5) as dist:
        mesh = init_device_mesh("cpu", (dist.world,))
        table = empty_rows(torch.empty(ROWS, DIM, device="meta"), mesh)
        first, own = rows_here(table)
        own.copy_(TABLE[first : first + len(own)])
        rows, kept = ShardedRows(table), None if sparse else RowGradients()
        sums = rows.looked_up(INDEX[dist.rank], kept)
        (sums * torch.arange(1.0, 1 + len(sums))[:, None]).sum().backward()
        if kept is None:
            assert rows.held.grad is not None
            gradient = rows.held.grad.to_dense()
        else:
            assert rows.held.grad is None
            gradient = torch.zeros_like(own).index_add_(0, kept.index[0][:, 0], kept.gradients[0])
        counts = rows.exchanged
    return sums.detach(), gradient, own, (counts.looked_up, counts.received)


TABLE = torch.arange(float(ROWS * DIM)).view(ROWS, DIM)
INDEX = [torch.tensor([[0, 7, 7], [10, 1, 0]]), torch.tensor([[7, 10, 2]]), torch.empty(0, 3, dtype=torch.long)]


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse gradients", "gradients of bags"])
def test_rows_of_a_table_come_from_their_holders_and_gradients_go_back(sparse: bool) -> None:
    """Eleven rows over three processes: four, four and three."""
    whole = TABLE.clone().requires_grad_()
    for index in INDEX:
        sums = F.embedding_bag(index, whole, mode="sum")
        (sums * torch.arange(1.0, 1 + len(sums))[:, None]).sum().backward()
    found = worlds.run(3, exchanged, sparse)
    for index, (sums, *_) in zip(INDEX, found, strict=True):
        assert torch.equal(sums, F.embedding_bag(index, TABLE, mode="sum"))
    assert [len(own) for _, _, own, _ in found] == [4, 4, 3]
    assert whole.grad is not None and torch.equal(torch.cat([gradient for _, gradient, *_ in found]), whole.grad)
    # Process 0 wants four rows, two of which it holds, and gets the gradient of row 2 from process 1.
    assert [counts for *_, counts in found] == [(4, 3), (3, 3), (0, 2)]


@pytest.mark.parametrize(
    ("given", "world", "local", "layout"),
    [
        ({}, 4, 4, (1, 4)),
        ({}, 512, 8, (64, 8)),
        ({"shard": 2}, 4, 4, (2, 2)),
        ({"replicate": 4}, 4, 4, (4, 1)),
        ({"replicate": 2, "shard": 2}, 4, 2, (2, 2)),
    ],
)
def test_processes_are_laid_out(given: dict[str, int], world: int, local: int, layout: tuple[int, int]) -> None:
    assert ParallelConfig(**given).layout(world, local) == layout


def test_a_layout_that_does_not_fit_is_refused() -> None:
    wanted = (
        r"parallel.replicate = 1 times parallel.shard = 3 is not the 4 processes there are: leave one of them \"auto\""
    )
    with pytest.raises(ConfigError, match=wanted):
        ParallelConfig(shard=3).layout(4, 4)
    with pytest.raises(ConfigError, match=r'parallel.shard = 0: must be at least 1, or "auto"'):
        ParallelConfig(shard=0)


@pytest.mark.fault("C2")
@pytest.mark.parametrize("setting", ["train.batch=4", "parallel.shard=2"])
def test_what_does_not_fit_the_processes_is_refused_before_anything_is_made(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing and the entropy model may take hours, and a configuration that is kept could not be changed."""
    (tmp_path / "notes.txt").write_text("a line of notes\n" * 100)
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = configure("byte-tiny", sets=["train.batch=6", setting], steps=1)
    with pytest.raises(ConfigError, match=r"cannot be shared by 3 processes|is not the 3 processes"):
        train([tmp_path / "notes.txt"], config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("C3")
def test_a_model_that_fits_many_processes_only_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine all take of the same memory; of many machines each has its own."""
    (tmp_path / "notes.txt").write_text("a line of notes\n" * 100)
    config = configure("blt-1b", sets=["train.device=cpu"], steps=1)

    def needed(world: int, local: int) -> estimate.Needs:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        found = estimate.needs([tmp_path / "notes.txt"], config, tmp_path)
        return replace(found, free_memory=80 * 10**9, free_host=80 * 10**9, free_disk=10**12)

    one, one_of_eight, eight = needed(1, 1), needed(8, 1), needed(8, 8)
    with pytest.raises(ResourceError, match=r"a step takes .* of memory and 80 GB are free"):
        estimate.check(one, config, tmp_path)
    laid = Layout(8)
    held = plan.memory(config.recipe.build_for_counting(), config, laid, 8, 32, 4)
    assert one_of_eight.memory == held.total - held.beside + estimate.BESIDE < one.memory / 2
    assert eight.memory == 8 * one_of_eight.memory
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    estimate.check(one_of_eight, config, tmp_path)
    with pytest.raises(ResourceError, match=r"--set train\.batch=(8|16|32) |use a smaller --preset"):
        estimate.check(replace(one_of_eight, free_memory=one_of_eight.memory - 1), config, tmp_path)
    spared = estimate.lighter(config)
    assert (batch := re.search(r"train\.batch=(\d+)", spared)) is None or not int(batch[1]) % 8, spared
