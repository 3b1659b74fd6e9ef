"""Going down gradients: tables by their rows as torch's SparseAdam does, everything else as AdamW, clipped together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.interfaces.model import LookupTable
from bytelm.interfaces.objective import score
from bytelm.models.blt import model as blt
from bytelm.nn import fused
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.nn.rows import sent
from bytelm.nn.transformer import Block
from bytelm.patching import fixed
from bytelm.patching.layout import Rows
from bytelm.testing import UniformModel
from bytelm.testing.pretend import moved, near, pretend
from bytelm.training import checkpointer, optimise
from bytelm.training.config import TrainConfig
from bytelm.training.optimise import Optimizer, RowAdam
from bytelm.transfer import to_device, to_host
from bytelm.units import BOS
from processors import PROCESSORS, used

CONFIG = TrainConfig(steps=10, learning_rate=0.01, max_grad_norm=0.5, embedding_lr_scale=4.0)


@pytest.fixture(params=[*PROCESSORS, "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param == "torch":
        for module in (fused, optimise):
            monkeypatch.setattr(module, "functions", lambda: None)
        yield False
    else:
        with used(request.param):
            yield True


def rows_of(table: Tensor, index: Tensor, kernels: bool) -> Tensor:
    return fused.bags(table, index) if kernels else F.embedding_bag(index, table, mode="sum", sparse=True)


def test_the_slope_of_a_table_is_that_of_its_rows(kernels: bool) -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(50, 32))
    index = torch.randint(0, 40, (30, 3))
    gradient = torch.randn(30, 32)
    found = rows_of(table, index, kernels)
    found.backward(gradient)
    assert table.grad is not None and table.grad.is_sparse
    sparse, table.grad = table.grad, None
    wanted = F.embedding(index, table).sum(1)
    wanted.backward(gradient)
    assert torch.allclose(found, wanted) and torch.allclose(sparse.to_dense(), table.grad, atol=1e-6)
    if kernels:  # nothing has to be sorted and summed later
        assert torch.equal(sparse._indices()[0], index.unique())


def some_rows() -> Tensor:
    """A coalesced sparse gradient of seven of twenty rows."""
    index, values = torch.randperm(20)[:7].sort().values, torch.randn(7, 32)
    return torch.sparse_coo_tensor(index[None], values, (20, 32), is_coalesced=True, check_invariants=False)


def test_rows_move_as_torchs_own_do(kernels: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(20, 32)) for _ in range(2))
    fast, slow = RowAdam([ours], 0.1, 0.95, 1.0, False), torch.optim.SparseAdam([theirs], lr=0.1, betas=(0.0, 0.95))
    for _ in range(4):
        ours.grad = theirs.grad = some_rows()
        fast.step()
        slow.step()
    assert torch.allclose(ours, theirs, atol=1e-6) and not torch.equal(ours, torch.ones(20, 32))
    assert set(fast.state[ours]) == {"step", "exp_avg_sq"}  # and no first moment, which is the gradient itself


def test_row_wise_each_row_has_one_second_moment_of_its_mean_square(kernels: bool) -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.ones(20, 32))
    optimizer = RowAdam([table], 0.1, 0.95, 1.0, True)
    wanted, second = torch.ones(20, 32), torch.zeros(20)
    for step in range(1, 5):
        table.grad = some_rows()
        optimizer.step()
        gradient = table.grad.to_dense()
        read = gradient.ne(0).any(1)
        second = torch.where(read, 0.95 * second + 0.05 * gradient.square().mean(1), second)
        deviation = (second / (1 - 0.95**step)).sqrt().clamp(min=1e-30)
        wanted -= 0.1 * gradient / deviation[:, None]
    torch.testing.assert_close(table.detach(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimizer.state[table]["exp_avg_sq"], second[:, None], rtol=1e-5, atol=1e-8)


def test_optimizers_of_tables_go_on_where_the_other_kind_stopped(kernels: bool) -> None:
    """A mean of averages is the average of means: row-wise after four steps of Adam has the moment it would have."""
    torch.manual_seed(0)
    gradients = [some_rows() for _ in range(5)]

    def moments(kinds: list[bool]) -> Tensor:
        table, state = nn.Parameter(torch.ones(20, 32)), dict[str, Tensor]()
        for gradient, rowwise in zip(gradients, kinds, strict=True):
            optimizer = RowAdam([table], 0.1, 0.95, 1.0, rowwise)
            optimizer.state[table].update(state)
            table.grad = gradient
            optimizer.step()
            state = optimizer.state[table]
        assert state["step"] == 5
        return state["exp_avg_sq"]

    rowwise, full = moments([True] * 5), moments([False] * 5)
    torch.testing.assert_close(moments([False] * 4 + [True]), rowwise)
    back = moments([True] * 4 + [False])
    assert back.shape == full.shape and back.is_contiguous() and not torch.equal(back, full)
    torch.testing.assert_close(back.mean(1, keepdim=True), rowwise)


def small() -> blt.BLT:
    model = blt.Config(local_dim=32, global_dim=64, global_layers=1, ngram_rows=5000).build(
        fixed.Config(size=4).build()
    )
    model.init_weights(0)
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_everything_else_moves_as_in_torchs_adamw(fused: bool) -> None:
    """Bit for bit, with groups of their own decay and rate, and a parameter that has no gradient at first."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (3,), (4, 4))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]

    def groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": of[:1], "weight_decay": 0.1}, {"params": of[1:], "weight_decay": 0.0}]

    own = optimise.AdamW(groups(ours), 0.01, (0.9, 0.95), fused)
    reference = torch.optim.AdamW(groups(theirs), lr=0.01, betas=(0.9, 0.95), fused=fused)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = None if step < 2 and a is ours[2] else torch.randn(a.shape)
            b.grad = None if a.grad is None else a.grad.clone()
        own.param_groups[1]["lr"] = reference.param_groups[1]["lr"] = 0.01 * step
        own.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert own.state[a].keys() == reference.state[b].keys()
        assert all(torch.equal(own.state[a][key], value) for key, value in reference.state[b].items())
    own.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


def test_all_gradients_are_clipped_together_and_tables_learn_at_their_own_rate(kernels: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 100))
    ids[:, 0] = BOS
    model, plain = small(), small()
    optimizer = Optimizer(model, CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    score(model, ids)[0].backward()
    score(plain, ids)[0].backward()
    wanted = nn.utils.clip_grad_norm_(plain.parameters(), CONFIG.max_grad_norm)
    assert optimizer.norm() == pytest.approx(float(wanted), rel=1e-5)
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad.to_dense(), gradients[name], atol=1e-6), name
    optimizer.step(0.01)
    # The first step of Adam is as long as its rate wherever the slope is not next to nothing.
    for name, rate in (
        ("encoder.embed.ngram.weight", 0.04),
        ("encoder.embed.byte.weight", 0.04),
        ("decoder.norm.weight", 0.01),
    ):
        moved = (dict(model.named_parameters())[name].detach() - before[name]).abs()
        assert moved.max() == pytest.approx(rate, rel=1e-3), name
        assert torch.equal(moved == 0, gradients[name] == 0), name
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


class OneTable(UniformModel):
    """A model that is nothing but tables of n-grams."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = NgramEmbedding(32, (3, 5), 1, 40)

    def lookup_tables(self) -> list[LookupTable]:
        return [self.embed]


def learnt(sessions: list[str], kept: bool = True, rowwise: bool = False) -> dict[str, Tensor]:
    """What tables of n-grams learn in three steps a sitting, each on a device or not, with clipping that is at work.

    "tables on the host": the rest of the model is on a device.

    Micro-batches come twice a step and read some rows again and again, others now and then.
    """
    random = torch.Generator().manual_seed(0)
    model, moments = OneTable(), dict[str, Tensor]()
    embed = model.embed
    assert embed.ngram is not None
    config = replace(CONFIG, table_optimizer="rowwise_adam") if rowwise else CONFIG
    nn.init.normal_(embed.ngram.weight, generator=random)
    nn.init.normal_(embed.byte.weight, generator=random)
    for place in sessions:
        embed.on_host = place == "tables on the host"
        with nullcontext() if place == "cpu" else pretend() as seen:
            where = model if place == "cpu" else moved(model)
            there, optimizer = where.embed, Optimizer(where, config)
            assert bool(optimizer.kept) == (place == "device")
            weight = there.get_submodule("ngram").get_parameter("weight")
            own = {key: checkpointer.place(value, weight, key, table=True) for key, value in moments.items() if kept}
            optimizer.moments(weight).update(own)
            for _ in range(3):
                for _ in range(2):
                    rows = torch.randint(0, 40, (2, 30), generator=random) // torch.tensor([[1], [5]])
                    gradient = torch.randn(30, 32, generator=random)
                    index = rows.T + torch.tensor([0, 40])
                    bytes = there.byte(to_device(rows[0], where.embed.byte.weight))
                    found = sent(there.looked_up(to_device(index, weight)), bytes.device) + bytes
                    found.backward(to_device(gradient, bytes))
                norm = optimizer.norm()
                assert float(to_host(norm)) > 10 * CONFIG.max_grad_norm
                optimizer.step(0.01)
                optimizer.zero_grad()
            # Three of this test; with tables on the host a gradient each micro-batch and a clipping factor each step.
            assert seen is None or sum(seen.fetches.values()) == 3 + (9 if embed.on_host else 0)
            moments = {key: near(torch.as_tensor(value)).clone() for key, value in optimizer.moments(weight).items()}
            embed.load_state_dict({name: near(value) for name, value in there.state_dict().items()})
    return {**embed.state_dict(), "second": moments["exp_avg_sq"]}


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(
    "sessions",
    [
        *(["device"], ["device", "device"], ["cpu", "device"], ["device", "cpu"]),
        *(["tables on the host"], ["tables on the host", "device"], ["device", "tables on the host"]),
    ],
)
def test_tables_learn_on_a_device_what_they_do_on_a_cpu_and_go_on_there(
    kernels: bool, sessions: list[str], rowwise: bool
) -> None:
    found, wanted = learnt(sessions, rowwise=rowwise), learnt(["cpu"] * len(sessions), rowwise=rowwise)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.allclose(learnt(["cpu", "cpu"], kept=False)["second"], learnt(["cpu", "cpu"])["second"])


IN_TRITON = """
import torch
from bytelm.nn import rows

torch.manual_seed(0)
index = torch.randint(0, 23, (70, 3)) // torch.tensor([1, 4, 30]) + torch.tensor([0, 23, 46])  # of the last table one
found = []
for kernels in (False, True):
    rows.fits = lambda gradients: kernels
    for width in (40, 1):
        torch.manual_seed(1)
        table, second = torch.randn(69, 40), torch.zeros(69, width)
        for _ in range(3):
            gradients = rows.RowGradients([index[:50], index[50:]], [torch.randn(50, 40), torch.randn(20, 40)])
            found.append(gradients.norm())
            gradients.move(table, second, 0.01, 0.999, 1e-8)
        found += [table, second]
for plain, fast in zip(found[:10], found[10:], strict=True):
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")
def test_rows_move_in_triton_as_they_do_without() -> None:
    """In its interpreter: rows that one bag reads, or some, or all, of micro-batches, in a width of no power of two.

    With a second moment for each number, and one for each row.
    """
    there = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", IN_TRITON], env=there, check=True, timeout=300)


def test_another_rate_for_tables_changes_nothing_else() -> None:
    ids = torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, Tensor]] = []
    for rate in (1.0, 7.0):
        model = small()
        optimizer = Optimizer(model, replace(CONFIG, embedding_lr_scale=rate))
        score(model, ids)[0].backward()
        optimizer.norm()
        optimizer.step(0.01)
        found.append({name: p.detach() for name, p in model.named_parameters()})
    changed = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    assert changed == {"encoder.embed.byte.weight", "encoder.embed.ngram.weight"}


def test_dropout_is_of_training_alone_and_follows_from_the_seed() -> None:
    """Half of what layers and n-grams add is left out, the rest doubled: on average the same; measured without."""
    ids = torch.randint(0, 256, (1, 80), generator=torch.Generator().manual_seed(0))
    model = small().train()
    plain, _ = model(ids)
    for module in model.modules():
        if isinstance(module, Block | NgramEmbedding):
            module.dropout = 0.5

    def read(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids)[0].detach()

    assert torch.equal(read(0), read(0)) and not torch.equal(read(0), read(1)) and not torch.equal(read(0), plain)
    model.eval()
    assert torch.equal(read(0), plain)
    embed = model.encoder.embed.train()
    rows, starts = Rows.of(ids), ids < 0
    found = torch.stack([embed(rows.ids, starts, embed.initial_state(1)).detach() for _ in range(400)])
    alone = embed.byte(ids)
    left_out = (found == alone).all(-1).float().mean()
    assert 0.45 < left_out < 0.55  # whole bytes go without
    embed.eval()
    wanted = embed(rows.ids, starts, embed.initial_state(1))
    assert torch.allclose(found.mean(0), wanted, atol=0.3 * float(wanted.detach().std()))
