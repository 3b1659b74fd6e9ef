"""What a step of training is said to hold, against what torch's allocator gave out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bytelm.checkpoint.assemble import Recipe
from bytelm.data.sampler import Batch, Sampler
from bytelm.models.base import ByteModel
from bytelm.patching import fixed
from bytelm.train.config import TrainConfig
from bytelm.train.journal import Journal
from bytelm.train.loop import Trainer
from bytelm.train.memory import predict
from bytelm.train.settings import configure
from bytelm.units import BOS

PATCH = 5


class Windows(Sampler):
    """Documents of random bytes, patches of five."""

    def __init__(self, config: TrainConfig, patched: bool) -> None:
        self.shape, self.patched = (config.batch, config.window + 1), patched

    def batch(self, step: int) -> Batch:
        ids = torch.randint(0, 256, self.shape, generator=torch.Generator().manual_seed(step))
        ids[:, 0] = BOS
        opens = (torch.arange(self.shape[1]) % PATCH == 0).expand(self.shape)
        return Batch(ids.numpy(), opens.numpy() if self.patched else None)


def made(preset: str, *sets: str) -> tuple[ByteModel, TrainConfig]:
    config = configure(preset, None, ["train.precision=bfloat16", *sets], steps=10)
    recipe = Recipe(config.model, fixed.Config(size=PATCH)) if config.model.patched else replace(config.recipe)
    model = recipe.assemble()
    model.initialise(0)
    return model, config.train


def held(model: ByteModel, config: TrainConfig, run: Path) -> int:
    """Bytes at the peak of a second step: what stays between steps, and the most that was given out during it."""
    windows = Windows(config, hasattr(model, "patcher"))
    trainer = Trainer(model.train(), config, windows, run, Journal(run / "metrics.jsonl", quiet=True))
    trainer.step()
    moments = (trainer.optimizer.moments(p).values() for p in model.parameters() if p.requires_grad)
    staying = [*model.parameters(), *(m for own in moments for m in own if isinstance(m, torch.Tensor))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.step()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + sum(x.nbytes for x in staying)


@pytest.mark.usefixtures("own_training_kernels")
@pytest.mark.parametrize(
    ("preset", "sets"),
    [
        ("demo", []),
        ("blt-small", []),
        ("blt-small", ["train.recompute=true"]),
        ("blt-small", ["train.recompute=local"]),
        ("byte-tiny", []),
        ("byte-window-tiny", []),
        ("perceiver-tiny", []),
        ("linear-tiny", []),
        ("bpe-tiny", []),
        ("megabyte-tiny", []),
        ("megabyte-tiny", ["train.recompute=global"]),
        ("megabyte-image", []),
    ],
)
def test_the_memory_of_a_step_is_what_was_said(preset: str, sets: list[str], tmp_path: Path) -> None:
    """Never less than is taken, and at the most a quarter more."""
    model, config = made(preset, *sets)
    assert 0.97 < predict(model, config, PATCH).peak / held(model, config, tmp_path) < 1.25


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_a_stage_spares_memory_and_changes_no_gradient(tmp_path: Path, dropout: float) -> None:
    found: list[tuple[int, torch.Tensor]] = []
    for recompute in ("false", "global", "local", "true"):
        sets = f"train.recompute={recompute}", f"train.dropout={dropout}", "train.window=512", "train.batch=2"
        model, config = made("blt-tiny", *sets)
        bytes = held(model, config, tmp_path)
        spared = {stage.name: stage.stack.recompute for stage in model.stages(1, 1)}
        assert spared == {"local": recompute in ("true", "local"), "global": recompute in ("true", "global")}
        found.append((bytes, torch.cat([p.detach().flatten() for p in model.parameters()])))
    whole, outer, inner, all = (bytes for bytes, _ in found)
    assert all < inner < outer < whole
    assert all_equal(weights for _, weights in found)


def all_equal(tensors: Any) -> bool:
    first, *rest = tensors
    return bool(rest) and all(torch.equal(first, other) for other in rest)
