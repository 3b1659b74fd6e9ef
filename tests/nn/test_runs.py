"""Attention by runs is attention by masks: held to a kernel in plain torch, which stands in where there is no GPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.models.blt import model as blt
from bytelm.nn import runs
from bytelm.nn.attention import CausalPattern, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.runs import Runs
from bytelm.nn.transformer import LINE, Stack, StackConfig
from bytelm.patching import space
from bytelm.testing.elsewhere import elsewhere
from bytelm.testing.examples import marks, padded, rows
from bytelm.testing.pretend import moved, pretend
from bytelm.testing.tiny import initialized, tiny_models

HEADS, HEAD_DIM = 2, 8
MODELS = dict(tiny_models())

# --- the kernel in plain torch ----------------------------------------------------------------------------------------


def shown(query: Tensor, keys: Tensor, ends: Tensor, ends_of_keys: Tensor, most: list[int], before: int) -> Tensor:
    """Which of all keys each query sees, from the definition: same run, counted from where both end."""
    assert ends.dtype == ends_of_keys.dtype == torch.int32 and ends.is_contiguous() and ends_of_keys.is_contiguous()
    run, before_end = [], []
    for x, cut, longest in ((query, ends, most[0]), (keys, ends_of_keys, most[1])):
        slots = torch.arange(len(x))
        of = torch.searchsorted(cut[1:].contiguous(), slots, right=True)
        place = slots - cut[of.clamp(max=len(cut) - 2)]
        run.append(torch.where((of < len(cut) - 1) & (place < longest), of, -1 - len(run)))
        before_end.append(cut[1:][of.clamp(max=len(cut) - 2)] - slots)
    behind = before_end[1] - before_end[0][:, None]
    return (run[0][:, None] == run[1]) & (behind >= 0) & (behind <= (before if before >= 0 else len(keys)))


def weighed(query: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, keys) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)  # NaN for queries that see nothing: they stay unwritten


@torch.library.custom_op("bytelm_tests::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_of_keys: Tensor, most: list[int], w: int) -> Tensor:
    return torch.einsum("hqk,khd->qhd", weighed(q, k, shown(q, k, ends, ends_of_keys, most, w)), v)


@torch.library.custom_op("bytelm_tests::varlen_back", mutates_args=())
def varlen_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_of_keys: Tensor, most: list[int], w: int
) -> tuple[Tensor, Tensor, Tensor]:
    seen = shown(q, k, ends, ends_of_keys, most, w)
    weights = weighed(q, k, seen)
    of_weights = torch.einsum("qhd,khd->hqk", gradient, v)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    of_scores = of_scores.masked_fill(~seen & ~of_scores.isnan(), 0.0)
    found = "hqk,khd->qhd", "hqk,qhd->khd", "hqk,qhd->khd"
    parts = (of_scores, k), (of_scores, q), (weights, gradient)
    return tuple(torch.einsum(how, *part) for how, part in zip(found, parts, strict=True))  # type: ignore[return-value]


def kept(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


varlen.register_autograd(
    lambda ctx, d: (*varlen_back(d, *ctx.saved_tensors, *ctx.rest), *[None] * 4), setup_context=kept
)


Call = tuple[Tensor, Tensor, int, int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """The kernel in plain torch wherever it is asked for, in all precisions; the runs it was called with."""
    found: list[Call] = []

    def kernel(query: Tensor, keys: Tensor, values: Tensor, *by: Any, window_size: tuple[int, int]) -> Tensor:
        found.append(by)
        ends, ends_of_keys, *most = by
        before, after = window_size
        assert after == 0
        return varlen(query, keys, values, ends, ends_of_keys, most, before)

    monkeypatch.setattr(runs, "present", lambda device: True)
    monkeypatch.setattr(runs, "KINDS", (torch.float32, torch.float64))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    yield found


def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "present", lambda device: False)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


# --- one attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 5, 70])
@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
def test_runs_show_what_the_mask_shows(
    window: int | None, cached: bool, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(60):
        batch, new = rng.randint(1, 3), rng.choice([1, 2, 9, 40, 130])
        lengths = torch.tensor([rng.randint(0 if batch > 1 else 1, new) for _ in range(batch)])
        position = torch.tensor([rng.randint(0, 30) if cached else 0 for _ in range(batch)])
        where = RowPositions(position, torch.tensor([rng.randint(0, int(at)) for at in position]))
        starts = (torch.rand(batch, new) < 0.15) & (torch.arange(new) < lengths[:, None])
        starts[:, 0] |= (position == 0) & (lengths > 0)
        before = min(int(position.max()), window or 99)
        make = lengths, starts, where, before, window, HEAD_DIM, 1e4
        by_runs = CausalPattern.of(*make)
        with monkeypatch.context() as patch:
            masked(patch)
            by_mask = CausalPattern.of(*make)
        assert by_mask.runs is None and torch.equal(by_mask.first, by_runs.first)
        query = normal(batch, new, HEADS, HEAD_DIM)
        keys, values = (normal(batch, before + new, 1 + batch % 2, HEAD_DIM) for _ in range(2))
        found, wanted = by_runs.over(query, keys, values), by_mask.over(query, keys, values)
        assert bool(found.isfinite().all()), "a query stands in no run"
        real = torch.arange(new) < lengths[:, None]
        assert float((found - wanted)[real].norm()) < 1e-12
    assert len(calls) == 60


def test_runs_are_filled_up_to_a_power_of_two() -> None:
    def ends(count: int) -> Runs:
        line = torch.arange(count + 1)
        return Runs.of(line, 3 * line, None, torch.device("cpu"))

    assert [len(ends(count).queries) - 1 for count in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    found = ends(5)
    assert found.queries.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5] and found.keys[-3:].tolist() == [15] * 3
    assert (found.most_queries, found.most_keys) == (1, 3)


def test_a_kernel_is_asked_for_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "present", lambda device: True)
    some = Runs.of(torch.tensor([0, 4]), torch.tensor([0, 4]), None, torch.device("cpu"))

    def fits(count: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16, of: Runs = some) -> bool:
        return of.fits(torch.empty(count, heads, head_dim, dtype=dtype, device="meta"))

    assert fits(4, 2, 8) and fits(4, 2, 256, torch.float16)
    assert not any([fits(4, 2, 12), fits(4, 2, 264), fits(4, 2, 8, torch.float32), fits(0, 2, 8)])
    # 16 Mi queries of 128 numbers are 2^31 slopes, with those of a tile more than 32 bits can count.
    assert fits((1 << 24) - 129, 2, 64) and not fits((1 << 24) - 127, 2, 64)
    line = torch.arange(65_537)
    assert fits(1, 1, 8, of=Runs.of(line[:32_769], line[:32_769], None, torch.device("cpu")))
    assert not fits(1, 1, 8, of=Runs.of(line, line, None, torch.device("cpu")))


@pytest.mark.parametrize("window", [None, 7])
def test_torch_knows_the_kernel_by_that_name(window: int | None) -> None:
    by = Runs.of(torch.tensor([0, 3, 9]), torch.tensor([0, 5, 12]), window, torch.device("meta"))
    q, k, v = (torch.empty(n, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (9, 12, 12))
    found = by.attend(q, k, v)
    found.sum().backward()
    assert found.shape == q.shape and k.grad is not None and k.grad.shape == k.shape


# --- models -----------------------------------------------------------------------------------------------------------


def learnt(model: Any, batch: Tensor, given: Tensor) -> list[Tensor]:
    """The loss and all slopes."""
    model = copy.deepcopy(model).double().train()
    nats, _ = score(model, batch, boundaries=given)
    nats.backward()
    return [nats.detach(), *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_slopes_are_those_of_masks(name: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    batch, _ = padded(rng, rows(rng, 4))
    given = marks(rng, batch.shape[1]).expand(len(batch), -1)
    found = learnt(MODELS[name], batch, given)
    used = len(calls)
    masked(monkeypatch)
    wanted = learnt(MODELS[name], batch, given)
    without = name.startswith("linear") or name == "megabyte (three stages)"  # no scores; heads of 12 numbers
    assert bool(used) != without and len(calls) == used
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm() + 1e-6)  # angles are turned in float32


def test_a_packed_line_is_filled_up_and_equals_its_rows(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = initialised_stack(StackConfig(2, 32, 2, None, 1e4)).double()
    counts, x = torch.tensor([7, 0, 300]), normal(3, 300, 32)
    starts = torch.rand(3, 300) < 0.05
    found, *_ = stack.advance(x, counts, starts, RowPositions.zero(3), None)
    assert int(calls[0][0][-1]) == 2 * LINE
    masked(monkeypatch)
    wanted, *_ = stack.advance(x, counts, starts, RowPositions.zero(3), None)
    assert not found[1].any() and not found[0, 7:].any()
    for row, count in enumerate(counts):
        assert float((found - wanted)[row, :count].detach().norm()) < 1e-5


def initialised_stack(config: StackConfig) -> Stack:
    stack = Stack(config)
    init_weights(stack, config.layers, 0)
    return stack


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer (windowed)", "perceiver (one block)", *list(MODELS)[:1]])
def test_runs_are_planned_without_a_wait(name: str, calls: list[Call]) -> None:
    elsewhere(MODELS[name])
    assert any(ends.device.type == "meta" for ends, *_ in calls)


def test_a_step_by_runs_launches_a_fifth_fewer_kernels(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a BLT as deep as that of 400 million parameters, and narrow: what is launched does not depend on the width."""
    shape = replace(blt.Config.tiny()["last layer crossed"], encoder_layers=1, decoder_layers=7, global_layers=24)
    model = initialized(shape.build(space.Config().build()), 0).train()
    rng = random.Random(0)
    batch, _ = padded(rng, [line[:150] for line in rows(rng, 4)])
    given = torch.arange(batch.shape[1]).expand(len(batch), -1) % 4 == 0

    def launches() -> int:
        with pretend() as seen:
            nats, _ = score(moved(model), batch, boundaries=given)
            nats.backward()
        assert not seen.fetches
        return sum(seen.launches.values())

    by_runs = launches()
    assert len(calls) == 32 and by_runs <= 4100
    masked(monkeypatch)
    assert by_runs < 0.82 * launches()


def test_a_kernel_that_does_not_answer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another torch calls its arguments otherwise."""
    ones, arange = torch.ones, torch.arange
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: ones(*shape))
    monkeypatch.setattr(torch, "arange", lambda count, **_: arange(count))
    monkeypatch.setattr(runs, "kernel", lambda *_: None)
    assert runs.answers()

    def refuses(*_: Any) -> None:
        raise TypeError("unexpected keyword argument 'window_size'")

    monkeypatch.setattr(runs, "kernel", refuses)
    with pytest.warns(
        RuntimeWarning,
        match=r"variable-length attention fails here, using masked attention \(slower\): unexpected keyword",
    ):
        assert not runs.answers()


def test_a_step_copies_its_plan_in_few_pieces(calls: list[Call]) -> None:
    """What layers share travels once, however many they are."""
    batch, _ = padded(random.Random(0), [line[:150] for line in rows(random.Random(1), 3)])
    given = torch.arange(batch.shape[1]).expand(len(batch), -1) % 4 == 0

    def copies(model: ByteModel) -> int:
        with pretend() as seen:
            score(moved(initialized(model, 0)), batch, boundaries=given)
        return seen.uploads

    small = blt.Config.tiny()["last layer crossed"]
    deep = replace(small, encoder_layers=3, decoder_layers=6, global_layers=5)
    found = [copies(shape.build(space.Config().build())) for shape in (small, deep)]
    assert found[0] == found[1] <= 12
    assert copies(MODELS["transformer (windowed)"]) <= 5
    assert copies(MODELS["megabyte (two stages)"]) <= 18
