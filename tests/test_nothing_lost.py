"""Runs in a world that fails: bad numbers, signals, kills, full disks, odd terminals. Nothing learnt is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import load
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.cli import run as cli
from bytelm.data.sampler import Sampler
from bytelm.errors import ConfigError, ResourceError
from bytelm.models import objective
from bytelm.models.blt import BLT as BLT_MODEL
from bytelm.nn.embed import NgramEmbedding
from bytelm.train import loop, prepare
from bytelm.train.config import RunConfig
from bytelm.train.journal import Journal
from bytelm.train.optimise import Optimizer
from bytelm.train.run import train
from bytelm.train.settings import configure
from bytelm.train.spikes import IN_A_ROW, RECENT, Spikes
from bytelm.train.stop import StopRequest
from small import BLT, TRAINED

PLAIN = ["model.layers=1", "model.dim=16", "model.heads=2", *TRAINED]
SPACES = [*(s for s in BLT if not s.startswith("scorer")), "patching.name=space", *TRAINED]


def tiny(*sets: str, steps: int = 6) -> RunConfig:
    """A byte Transformer, which trains a hundred steps a second."""
    return configure("byte-tiny", sets=[*PLAIN, *sets], steps=steps)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["the", "patch", "byte", "model", "of", "reads", "\x00", "déjà", "return", "x = 1\n"]
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(150)), encoding="utf-8")
    return folder


def held(run: Path) -> dict[str, Tensor]:
    """Weights and moments of the newest checkpoint."""
    path = store.newest(run)
    return {f"{g}/{k}": v for g in ("model", "optimizer") for k, v in store.read_tensors(path, g).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def now(trainer: loop.Trainer) -> dict[str, Tensor]:
    """Weights and moments as they are."""
    found = {f"model/{name}": tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.moments(parameter).items():
            found[f"{name}/{key}"] = torch.as_tensor(value).clone()
    return found


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / METRICS) if line["kind"] == kind]


# --- bad numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T1")
def test_a_bad_slope_of_a_table_touches_nothing_and_the_next_step_is_that_of_a_run_without_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, what dropout draws, the order of the data: step 3 is skipped as if it had not been."""
    config = configure("demo", sets=[*SPACES, "train.dropout=0.2"], steps=5)
    seen: dict[str, list[Any]] = {"hurt": [], "left out": []}
    norm, step = Optimizer.norm, loop.Trainer.step

    def poisoned(self: Optimizer) -> float:
        if trainer.run.name == "hurt" and trainer.progress.step == 2:
            gradients = [p.grad for p in self.parameters if p.grad is not None and p.grad.is_sparse]
            gradients[0]._values()[0, 0] = float("inf")
        found = norm(self)
        return float("nan") if trainer.run.name == "left out" and trainer.progress.step == 2 else found

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
    exact, run = objective.score, tmp_path / "run"

    def poisoned(model: Any, ids: Tensor, boundaries: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nats, count = exact(model, ids, boundaries=boundaries)
        return (nats * float("nan") if torch.is_grad_enabled() else nats), count

    words = ["train", str(corpus), "--preset", "byte-tiny", "--run", str(run), "--quiet", "--steps"]
    sets = [word for s in PLAIN for word in ("--set", s)]
    assert cli([*words, "2", *sets]) == 0
    before = held(run)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "score", poisoned)
        assert cli([*words, "50", *sets]) == 6
    line = capfd.readouterr().err.strip()
    assert "training: 10 steps in a row were not finite, up to step 12" in line and "\n" not in line
    assert store.read_state(store.newest(run))["step"] == 12 and same(before, held(run))
    assert cli([*words, "14", *sets]) == 0
    assert not same(before, held(run))


def spiked(patch: pytest.MonkeyPatch, at: set[int], run: str, seen: list[tuple[int, dict[str, Tensor]]]) -> None:
    """The loss of these steps (counted from 1) of a run of this name is four times what it is."""
    exact, step = objective.score, loop.Trainer.step
    due = 0

    def larger(model: Any, ids: Tensor, boundaries: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nats, count = exact(model, ids, boundaries=boundaries)
        return nats * (4 if torch.is_grad_enabled() and due in at else 1), count

    def watched(self: loop.Trainer) -> None:
        nonlocal due
        due = self.progress.step + 1 if self.run.name == run else 0
        step(self)
        seen.append((self.progress.step, now(self)))

    patch.setattr(loop, "score", larger)
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
    config, unused = tiny("train.clip=10"), Sampler.__new__(Sampler)
    trainer = loop.Trainer(config.recipe.assemble(), config.train, unused, tmp_path, Journal(tmp_path / METRICS, True))
    assert all(trainer.refusal(700.0, 100, 0.1) is None for _ in range(RECENT))
    assert trainer.refusal(700.0, 100, 9.9) is None
    assert "grad_norm 21 is far above 10" in str(trainer.refusal(700.0, 100, 21.0))


# --- signals ----------------------------------------------------------------------------------------------------------

TRAIN = [sys.executable, "-m", "bytelm", "train"]


def command(corpus: Path, run: Path, steps: int, sets: list[str]) -> list[str]:
    preset = "byte-tiny" if sets is PLAIN else "demo"
    words = [*TRAIN, str(corpus), "--preset", preset, "--run", str(run), "--steps", str(steps)]
    return [*words, *(word for s in sets for word in ("--set", s))]


WHOLE = configure("demo", sets=[*BLT, *TRAINED, "train.valid_bytes=1000000"], steps=3)
STAGES: dict[str, tuple[Any, str, signal.Signals]] = {
    "packing": (prepare, "pack", signal.SIGTERM),
    "the scorer's steps": (loop.Trainer, "step", signal.SIGUSR1),
    "calibrating": (prepare, "calibrate", signal.SIGTERM),
    "cutting patches": (prepare, "cut_group", signal.SIGINT),
    "the last look": (loop, "score", signal.SIGTERM),
}


@pytest.fixture(scope="module")
def through(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("through") / "run"
    train([corpus], WHOLE, run, quiet=True)
    return run


@pytest.mark.fault("T3")
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_any_stage_is_heard_there(
    corpus: Path, through: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """What began when it came does not come to its end, and the same command does all that is left to do."""
    (where, name, number), run = STAGES[stage], tmp_path / "run"
    exact, calls = getattr(where, name), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if stage != "the last look" or (isinstance(arguments[0], BLT_MODEL) and not torch.is_grad_enabled()):
            calls += 1
            if calls == 1:
                os.kill(os.getpid(), number)
        return exact(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupted)
        ended = train([corpus], WHOLE, run, quiet=True)
    assert ended.signal == number and calls == 1
    assert (ended.progress is None) == (stage != "the last look")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    done = train([corpus], WHOLE, run, quiet=True)
    assert done.signal is None and done.progress is not None and done.progress.step == 3
    assert same(held(run), held(through))
    assert [line["step"] for line in of_kind(run, "valid")] == [3]


@pytest.mark.fault("T3")
def test_a_signal_in_the_closing_measurement_ends_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from bytelm.evaluate import bits

    words = command(corpus, tmp_path / "run", 2, PLAIN)[3:]
    score = bits._Windows.score  # pyright: ignore[reportPrivateUsage]

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bits._Windows, "score", interrupted)  # pyright: ignore[reportPrivateUsage]
        assert cli(words) == 128 + signal.SIGTERM
    assert "saved step 2 in" in capfd.readouterr().err and not (tmp_path / "run" / "report.html").exists()
    assert cli(words) == 0 and (tmp_path / "run" / "report.html").exists()


@pytest.mark.fault("T3")
def test_a_second_signal_leaves_at_once() -> None:
    with StopRequest() as stop:
        with StopRequest() as inner:
            assert inner is stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def rounds(corpus: Path, tmp_path: Path, count: int, seed: int) -> None:
    """`count` runs in processes of their own, each sent a signal at some instant and then brought to its end."""
    rng = random.Random(seed)
    sets = [*BLT, *TRAINED, "train.valid_minutes=0.01"]
    through = command(corpus, tmp_path / "through", 400, sets)
    began = time.monotonic()
    subprocess.run(through, check=True, capture_output=True)
    length = time.monotonic() - began
    heard = 0
    for index in range(count):
        run = tmp_path / f"run{index}"
        words = command(corpus, run, 400, sets)
        number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
        job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(rng.uniform(0.3, 1.0) * length)
        job.send_signal(number)
        _, said = job.communicate(timeout=300)
        begun = (run / "lock").exists()
        if job.returncode == 128 + number and "saved" in said:
            heard += 1
        else:  # before there was anything to save, or after the end
            assert job.returncode == 0 or not begun or not store.checkpoints(run), (job.returncode, said)
        assert not begun or "Traceback" not in said, said
        subprocess.run(words, check=True, capture_output=True)
        assert same(held(tmp_path / "through"), held(run))
        shutil.rmtree(run)
    print(f"{count} signals, {heard} of them heard while something was under way")


@pytest.mark.fault("T3")
@pytest.mark.slow
def test_fifty_signals_at_random_times(corpus: Path, tmp_path: Path) -> None:
    rounds(corpus, tmp_path, 50, 0)
