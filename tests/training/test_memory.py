"""What a step of training is said to hold, against what torch's allocator gave out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bytelm.data.sampler import Batch
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import prepare, scored
from bytelm.nn import attention, fused
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.nn.rows import RowGradients
from bytelm.training.config import TrainConfig
from bytelm.training.draw import to_tensors
from bytelm.training.journal import Journal
from bytelm.training.loop import Trainer
from bytelm.training.memory import BUFFERS, kept, predict
from bytelm.training.optimise import BagAdam
from bytelm.units import BOS
from trainable import PATCH, Windows, made

ACROSS = ["model.local_window=64", "model.ngram_sizes=[3,4,5]", "model.ngram_rows=4096", "model.reach=0"]
FEW = ["model.ngram_rows=2048"]
THREE = ["model.sizes=[8,8]", "model.dims=[128,64,64]", "model.layers=[1,1,1]", "model.heads=[2,2,2]"]


def held(model: ByteModel, config: TrainConfig, run: Path) -> int:
    """Bytes at the peak of a second step: what stays between steps, and the most that was given out during it."""
    windows = Windows(config, model.patcher is not None)
    trainer = Trainer(model.train(), config, windows, run, Journal(run / "metrics.jsonl", quiet=True))
    trainer.step()
    moments = (trainer.optimizer.moments(p).values() for p in model.parameters() if p.requires_grad)
    staying = [*model.parameters(), *(m for own in moments for m in own if isinstance(m, torch.Tensor))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.step()
    return most(seen) + sum(x.nbytes for x in staying)


def most(seen: profile) -> int:
    """Bytes that were given out and not taken back yet, at the most."""
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.usefixtures("own_training_kernels")
@pytest.mark.parametrize(
    ("preset", "sets"),
    [
        ("demo", []),
        pytest.param("blt-small", [], marks=pytest.mark.slow),
        ("blt-small", FEW),
        ("blt-small", ["train.activation_checkpointing=true"]),
        ("blt-small", [*FEW, "train.activation_checkpointing=local"]),
        ("byte-tiny", []),
        ("byte-window-tiny", []),
        ("perceiver-tiny", []),
        ("linear-tiny", []),
        ("bpe-tiny", []),
        ("megabyte-tiny", []),
        ("megabyte-tiny", ACROSS),
        ("megabyte-tiny", ["train.activation_checkpointing=global"]),
        ("megabyte-image", []),
    ],
)
def test_the_memory_of_a_step_is_what_was_said(preset: str, sets: list[str], tmp_path: Path) -> None:
    """Never less than is taken, and at the most a quarter more."""
    model, config = made(preset, *sets)
    assert 0.97 < predict(model, config, PATCH).peak / held(model, config, tmp_path) < 1.25


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_recomputing_a_stage_spares_memory_and_changes_no_gradient(tmp_path: Path, dropout: float) -> None:
    found: list[tuple[int, torch.Tensor]] = []
    for recompute in ("false", "global", "local", "true"):
        sets = (
            f"train.activation_checkpointing={recompute}",
            f"train.dropout={dropout}",
            "train.context_length=512",
            "train.batch=2",
        )
        model, config = made("blt-tiny", *FEW, *sets)
        bytes = held(model, config, tmp_path)
        spared = {stage.name: stage.stack.recompute for stage in model.stages(1, 1)}
        assert spared == {"local": recompute in ("true", "local"), "global": recompute in ("true", "global")}
        found.append((bytes, torch.cat([p.detach().flatten() for p in model.parameters()])))
    whole, outer, inner, all = (bytes for bytes, _ in found)
    assert all < inner < outer < whole
    assert all_equal(weights for _, weights in found)


class Norm(torch.autograd.Function):
    """What a GPU keeps of a norm: its input, and a number a line."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        factor = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, factor)
        return x * factor * weight


@pytest.fixture
def torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep what torch's kernels on a GPU do."""
    monkeypatch.setattr(fused, "ready", lambda kind: False)
    monkeypatch.setattr(attention, "PRODUCTS", 0)
    monkeypatch.setattr(F, "rms_norm", lambda x, _, weight, eps: Norm.apply(x, weight, eps))


class Documents(Windows):
    """Several documents a window."""

    def batch(self, step: int) -> Batch:
        found = super().batch(step)
        found.ids[:, 100::150] = BOS
        return found


@pytest.mark.usefixtures("torchs_kernels")
@pytest.mark.parametrize(
    ("preset", "sets"),
    [
        ("demo", []),
        ("blt-tiny", ["model.attention_window=512", "model.queries=1"]),
        ("byte-tiny", []),
        ("byte-window-tiny", []),
        ("megabyte-tiny", []),
        ("megabyte-tiny", THREE),
        ("megabyte-tiny", ACROSS),
        ("perceiver-tiny", []),
    ],
)
def test_what_torchs_kernels_keep_of_a_forward_pass_is_what_was_said(preset: str, sets: list[str]) -> None:
    model, config = made(preset, *sets, "train.context_length=1024", "train.batch=2")
    for module in model.train().modules():
        if isinstance(module, NgramEmbedding) and module.ngram is not None:
            module.kept = RowGradients()
    ids, opens = to_tensors(Documents(config, model.patcher is not None).batch(0))
    prepared = prepare(model, ids, boundaries=opens)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    held: dict[int, torch.Tensor] = {}

    def hold(x: torch.Tensor) -> torch.Tensor:
        place = x.untyped_storage().data_ptr()
        cast = x.dtype == torch.bfloat16 and x.shape in shapes  # of weights, as autocast made it
        if place not in weights and not cast:
            held[place] = x
        return x

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        loss, _ = scored(model, prepared)
    taken = sum(x.untyped_storage().nbytes() for x in held.values())
    assert loss.requires_grad and 0.95 < kept(model, config, PATCH, torch.device("mps")) / taken < 1.1


@pytest.mark.parametrize("accumulate", [1, 8])
def test_tables_move_in_as_many_buffers_as_was_said(accumulate: int) -> None:
    torch.manual_seed(0)
    bags, dim = 200, 64
    embed = NgramEmbedding(dim, (3, 4), 1, 300)
    optimizer = BagAdam([embed], 0.01, 0.99, 1.0)

    def step() -> int:
        for _ in range(accumulate):
            embed.looked_up(torch.randint(0, 600, (bags, 2))).sum().backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            optimizer.kept[0].norm()
            optimizer.step()
        optimizer.zero_grad()
        return most(seen)

    step()
    numbers = 8 * 8 * bags * accumulate  # a few whole ones for each row that is read
    assert 0.7 < step() / (BUFFERS * accumulate * 4 * bags * dim + numbers) < 1.0


def all_equal(tensors: Any) -> bool:
    first, *rest = tensors
    return bool(rest) and all(torch.equal(first, other) for other in rest)
