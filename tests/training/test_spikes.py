"""Losses and gradients that are not finite, or far beyond the ones before: left out, told, and never learnt from."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.metrics import METRICS
from bytelm.cli import run as cli
from bytelm.data.sampler import Sampler
from bytelm.interfaces import objective
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.training import loop
from bytelm.training.journal import Journal
from bytelm.training.optimise import Optimizer
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.spikes import IN_A_ROW, RECENT, Spikes
from trainings import PLAIN, SPACES, held, now, of_kind, same, tiny


@pytest.mark.fault("T1")
def test_a_bad_slope_of_a_table_touches_nothing_and_the_next_step_is_that_of_a_run_without_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, what dropout draws, the order of the data: step 3 is skipped as if it had not been."""
    config = configure("demo", sets=[*SPACES, "train.dropout=0.2"], steps=5)
    seen: dict[str, list[Any]] = {"hurt": [], "left out": []}
    norm, step = Optimizer.norm, loop.Trainer.step

    def poisoned(self: Optimizer) -> Tensor:
        if trainer.run.name == "hurt" and trainer.progress.step == 2:
            gradients = [p.grad for p in self.parameters if p.grad is not None and p.grad.is_sparse]
            gradients[0]._values()[0, 0] = float("inf")
        found = norm(self)
        return found * float("nan") if trainer.run.name == "left out" and trainer.progress.step == 2 else found

    def watched(self: loop.Trainer) -> None:
        nonlocal trainer
        trainer = self
        step(self)
        windows = self.sampler.batch(self.progress.step).ids
        seen[self.run.name].append((now(self), torch.rand(3), torch.from_numpy(windows)))
        torch.manual_seed(0)

    trainer: Any = None
    monkeypatch.setattr(Optimizer, "norm", poisoned)
    monkeypatch.setattr(loop.Trainer, "step", watched)
    for name in seen:
        train([corpus], config, tmp_path / name, quiet=True)
        assert same(seen[name][1][0], seen[name][2][0]) and not same(seen[name][2][0], seen[name][3][0])
    for hurt, left_out in zip(*seen.values(), strict=True):
        assert same(hurt[0], left_out[0]) and torch.equal(hurt[1], left_out[1]) and torch.equal(hurt[2], left_out[2])
    assert any(isinstance(m, NgramEmbedding) and m.ngram is not None for m in trainer.model.modules())
    (told,) = of_kind(tmp_path / "hurt", "skipped")
    assert told["step"] == 3 and "gradient norm inf" in told["reason"] and told["skipped"] == 1


@pytest.mark.fault("T1")
def test_ten_in_a_row_save_the_run_and_end_with_6(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    exact, run = objective.scored, tmp_path / "run"

    def poisoned(model: Any, prepared: Any) -> tuple[Tensor, Tensor]:
        nats, count = exact(model, prepared)
        return (nats * float("nan") if torch.is_grad_enabled() else nats), count

    words = ["train", str(corpus), "--preset", "byte-tiny", "--run", str(run), "--quiet", "--steps"]
    sets = [word for s in PLAIN for word in ("--set", s)]
    assert cli([*words, "2", *sets]) == 0
    before = held(run)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "scored", poisoned)
        assert cli([*words, "50", *sets]) == 6
    line = capfd.readouterr().err.strip()
    wanted = "training: 10 consecutive steps with a non-finite loss or gradient, up to step 12"
    assert wanted in line and "\n" not in line
    assert store.read_state(store.newest(run))["step"] == 12 and same(before, held(run))
    assert cli([*words, "14", *sets]) == 0
    assert not same(before, held(run))


def spiked(patch: pytest.MonkeyPatch, at: set[int], run: str, seen: list[tuple[int, dict[str, Tensor]]]) -> None:
    """The loss of these steps (counted from 1) of a run of this name is four times what it is."""
    exact, step = objective.scored, loop.Trainer.step
    due = 0

    def larger(model: Any, prepared: Any) -> tuple[Tensor, Tensor]:
        nats, count = exact(model, prepared)
        return nats * (4 if torch.is_grad_enabled() and due in at else 1), count

    def watched(self: loop.Trainer) -> None:
        nonlocal due
        due = self.progress.step + 1 if self.run.name == run else 0
        step(self)
        seen.append((self.progress.step, now(self)))

    patch.setattr(loop, "scored", larger)
    patch.setattr(loop.Trainer, "step", watched)


@pytest.mark.fault("T2")
def test_a_spike_is_left_out_and_told_and_another_level_is_learnt_from(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at step 70; from step 80 on every step: five are left out, then it is the level."""
    seen: list[tuple[int, dict[str, Tensor]]] = []
    spiked(monkeypatch, {70, *range(80, 200)}, "run", seen)
    run = tmp_path / "run"
    train([corpus], tiny(steps=95), run, quiet=True)
    told = {line["step"]: line["reason"] for line in of_kind(run, "skipped")}
    assert list(told) == [70, *range(80, 80 + IN_A_ROW)]
    assert all("bits_per_byte" in reason and "far above" in reason for reason in told.values())
    after = dict(seen)
    assert same(after[69], after[70]) and not same(after[70], after[71])
    assert same(after[79], after[84]) and not same(after[84], after[85])
    assert store.read_state(store.newest(run))["skipped"] == 6


@pytest.mark.fault("T2")
def test_spikes_can_be_kept(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spiked(monkeypatch, {70}, "run", seen := [])
    train([corpus], tiny("train.spikes=keep", steps=72), tmp_path / "run", quiet=True)
    after = dict(seen)
    assert of_kind(tmp_path / "run", "skipped") == [] and not same(after[69], after[70])


@pytest.mark.fault("T2", "T6")
@pytest.mark.parametrize("stop_at", [66, 82])
def test_a_run_stopped_amid_spikes_leaves_the_same_steps_out(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Before a spike, with a window that is full; and within a row of them, of which three are left to leave out."""
    config = tiny(steps=90)
    for name, stops in (("through", None), ("stopped", stop_at)):
        with monkeypatch.context() as patch:
            spiked(patch, {70, *range(80, 200)}, name, [])
            watched = loop.Trainer.step

            def stopping(self: loop.Trainer, watched: Any = watched, stops: int | None = stops) -> None:
                watched(self)
                if self.progress.step == stops:
                    os.kill(os.getpid(), signal.SIGUSR1)

            patch.setattr(loop.Trainer, "step", stopping)
            ended = train([corpus], config, tmp_path / name, quiet=True)
            assert ended.signal == (None if stops is None else signal.SIGUSR1)
            if stops is not None:
                patch.setattr(loop.Trainer, "step", watched)
                train([corpus], config, tmp_path / name, quiet=True)
    skipped = [[line["step"] for line in of_kind(tmp_path / n, "skipped")] for n in ("through", "stopped")]
    assert skipped == [[70, *range(80, 80 + IN_A_ROW)]] * 2
    assert same(held(tmp_path / "through"), held(tmp_path / "stopped"))


@pytest.mark.fault("T2")
def test_what_is_no_spike() -> None:
    """Too few steps to compare with; noise; a level that rises step by step; values that are nearly all the same."""
    few = Spikes()
    assert [few.judge(loss=1.0) for _ in range(RECENT - 1)] == [None] * (RECENT - 1)
    assert few.judge(loss=1e9) is None
    level = Spikes()
    assert all(level.judge(loss=1.0) is None for _ in range(RECENT))
    assert level.judge(loss=1.9) is None and level.judge(loss=2.5) is not None
    rng = random.Random(0)
    noise, rising = Spikes(), Spikes()
    assert all(noise.judge(loss=rng.lognormvariate(0, 0.25)) is None for _ in range(3000))
    assert all(rising.judge(loss=1.01**step) is None for step in range(2000))


@pytest.mark.fault("T2")
def test_a_norm_that_clipping_leaves_alone_is_no_spike(tmp_path: Path) -> None:
    config, unused = tiny("train.max_grad_norm=10"), Sampler.__new__(Sampler)
    trainer = loop.Trainer(config.recipe.build(), config.train, unused, tmp_path, Journal(tmp_path / METRICS, True))
    assert all(trainer.skip_reason(700.0, 100, 0.1) is None for _ in range(RECENT))
    assert trainer.skip_reason(700.0, 100, 9.9) is None
    assert "grad_norm 21 is far above 10" in str(trainer.skip_reason(700.0, 100, 21.0))
