"""Runs in a world that fails: bad numbers, signals, kills, full disks, odd terminals. Nothing learnt is lost."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.cli import run as cli
from bytelm.cli.common import print_table
from bytelm.config import load_toml
from bytelm.data.files import write_whole
from bytelm.data.sampler import Sampler
from bytelm.errors import ResourceError
from bytelm.find import names
from bytelm.interfaces import objective
from bytelm.models.blt.embed import NgramEmbedding
from bytelm.models.blt.model import BLT as BLT_MODEL
from bytelm.training import loop
from bytelm.training.config import RunConfig
from bytelm.training.journal import Journal
from bytelm.training.optimise import Optimizer
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.spikes import IN_A_ROW, RECENT, Spikes
from bytelm.training.stages import boundaries, packing, thresholds
from bytelm.training.stop import StopRequest
from small import BLT, TRAINED

PLAIN = ["model.layers=1", "model.dim=16", "model.heads=2", *TRAINED]
SPACES = [*(s for s in BLT if not s.startswith("entropy_model")), "patching.name=space", *TRAINED]


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
    exact, run = objective.uses_entropy_model, tmp_path / "run"

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
    exact, step = objective.uses_entropy_model, loop.Trainer.step
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


# --- signals ----------------------------------------------------------------------------------------------------------

TRAIN = [sys.executable, "-m", "bytelm", "train"]


def preset_of(sets: list[str]) -> str:
    return "byte-tiny" if sets is PLAIN else "demo"


def command(corpus: Path, run: Path, steps: int, sets: list[str]) -> list[str]:
    words = [*TRAIN, str(corpus), "--preset", preset_of(sets), "--run", str(run), "--steps", str(steps)]
    return [*words, *(word for s in sets for word in ("--set", s))]


WHOLE = configure("demo", sets=[*BLT, *TRAINED, "train.eval_bytes=1000000"], steps=3)
STAGES: dict[str, tuple[Any, str, signal.Signals]] = {
    "packing": (packing, "pack_files", signal.SIGTERM),
    "the entropy model's steps": (loop.Trainer, "step", signal.SIGUSR1),
    "calibrating": (thresholds, "calibrate", signal.SIGTERM),
    "computing patch boundaries": (boundaries, "cut_group", signal.SIGINT),
    "the last look": (loop, "scored", signal.SIGTERM),
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
    assert [line["step"] for line in of_kind(run, "validation")] == [3]


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


# One process pays for importing torch; the command is run in forks of it.
SIGNALS = r"""
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import bytelm.training.run, bytelm.evaluate.verdict, bytelm.report.page
from bytelm.checkpoint import store
from bytelm.cli import run as cli

home, words, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
rng = random.Random(count)

def command(run, wait=None, number=0):
    said = home / "said.txt"
    child = os.fork()
    if child == 0:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        os._exit(cli([*words, "--run", str(run)]))
    if wait is not None:
        time.sleep(wait)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()

for run in ("warm", "through"):
    began = time.monotonic()
    assert command(home / run)[0] == 0
length, ends = time.monotonic() - began, {}
weights = [store.read_tensors(store.newest(home / "through"), group) for group in ("model", "optimizer")]
run = home / "run"
for _ in range(count):
    number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    code, said = command(run, rng.uniform(0, length), number)
    assert "Traceback" not in said, said
    if code in (0, -number) or (code == 130 and "interrupted" in said):  # after the end, or before there was a run
        assert code == 0 or not (run / "config.toml").exists(), (code, said)
        end = "after the end" if code == 0 else "before the beginning"
    else:
        assert code == 128 + number and "saved" in said, (code, said)
        end = "preparing" if "what was prepared" in said else "training or measuring"
    ends[end] = ends.get(end, 0) + 1
    code, said = command(run)
    assert code == 0 and (run / "report.html").exists(), (code, said)
    for group, tensors in zip(("model", "optimizer"), weights):
        found = store.read_tensors(store.newest(run), group)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors | found)
    shutil.rmtree(run)
print(json.dumps(ends))
"""


@pytest.mark.fault("T3", "T6")
@pytest.mark.parametrize(
    ("sets", "count"),
    [(PLAIN, 2), pytest.param([*BLT, *TRAINED], 50, marks=pytest.mark.slow)],
    ids=["two", "fifty"],
)
def test_signals_at_random_times(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: list[str], count: int
) -> None:
    """The command ends with 128 and the signal, and given again it comes to the weights of one that heard none."""
    words = [*command(corpus, tmp_path, 100, sets)[3:], "--set", "train.eval_every_minutes=0.005"]
    at = words.index("--run")
    words = [*words[:at], *words[at + 2 :]]
    run = [sys.executable, "-c", SIGNALS, str(tmp_path), json.dumps(words), str(count)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{count} signals: {done.stdout.strip()}")


# --- going on ---------------------------------------------------------------------------------------------------------

STAGES_OF_TWO = ["model.sizes=[8]", "model.dims=[32,16]", "model.layers=[1,1]", "model.heads=[2,2]"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "transformer": ("byte-tiny", PLAIN),
    "linear": ("byte-tiny", ["model.name=linear", *PLAIN]),
    "perceiver": ("byte-tiny", ["model.name=perceiver", "model.latents=16", *PLAIN]),
    "megabyte": ("megabyte-tiny", [*STAGES_OF_TWO, *TRAINED]),
    "megabyte_pytorch": (
        "megabyte-tiny",
        ["model.name=megabyte_pytorch", *STAGES_OF_TWO, "model.head_dims=[16,8]", "model.ffn=[2,2]", *TRAINED],
    ),
    "blt": ("demo", [*BLT, *TRAINED]),
    "tokens": ("bpe-tiny", [*PLAIN, "model.vocabulary=300"]),
}
QUICK = ("megabyte", "blt")


@pytest.mark.fault("T6")
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_every_architecture_goes_on_as_if_it_had_not_stopped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Amid an epoch, with steps of several batches and with dropout; weights, moments and losses bit for bit."""
    assert set(KINDS) - {"tokens"} == set(names("models"))
    preset, sets = KINDS[kind]
    config = configure(preset, sets=[*sets, "train.gradient_accumulation_steps=2", "train.dropout=0.1"], steps=5)
    step = loop.Trainer.step

    def stopping(self: loop.Trainer) -> None:
        step(self)
        if self.run.name == "stopped" and self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    train([corpus], config, tmp_path / "through", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", stopping)
        assert train([corpus], config, tmp_path / "stopped", quiet=True).signal == signal.SIGTERM
    train([corpus], config, tmp_path / "stopped", quiet=True)
    assert same(held(tmp_path / "through"), held(tmp_path / "stopped"))
    valid = [[m["bits_per_byte"] for m in of_kind(tmp_path / n, "validation")] for n in ("through", "stopped")]
    assert valid[0] == valid[1] != []


# --- kills ------------------------------------------------------------------------------------------------------------

# One process pays for importing torch; each sitting is a fork of it. A pipe tells what was done and saved.
KILLS = r"""
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from bytelm.checkpoint import store
from bytelm.training import loop
from bytelm.training.run import train
from bytelm.training.settings import configure

corpus, home, kills, sets = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
config = configure("demo", sets=sets, steps=100_000)
rng = random.Random(kills)
step, save = loop.Trainer.step, loop.Trainer.save

def sitting(run, writer, last=None):
    def stepped(self):
        step(self)
        os.write(writer, b"%9d done " % self.progress.step)
        if self.progress.step == last:
            os.kill(os.getpid(), signal.SIGTERM)
    def saved(self):
        save(self)
        os.write(writer, b"%9d saved" % self.progress.step)
    loop.Trainer.step, loop.Trainer.save = stepped, saved
    train([corpus], config, run, quiet=True)

def forked(run, wait, last=None):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            sitting(run, writer, last)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        if wait is not None:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        told = stream.read()
    status = os.waitpid(child, 0)[1]
    assert status == (0 if wait is None else signal.SIGKILL), status
    words = told.split()
    told = list(zip(words[::2], words[1::2]))
    return [max((int(number) for number, what in told if what == kind), default=0) for kind in (b"done", b"saved")]

train([corpus], configure("demo", sets=sets, steps=1), home / "warm", quiet=True)  # imports what is imported late
run, lost, torn, there = home / "killed", [], 0, 0
for _ in range(kills):
    done, saved = forked(run, rng.uniform(0.1, 0.8))
    torn += len(list(run.glob("checkpoints/*.tmp-*")))
    saved, done = max(saved, there), max(done, there)
    there = 0
    if store.checkpoints(run):
        path, passed_over = store.newest_good(run)
        assert not passed_over, passed_over
        there = store.read_state(path)["step"]
    assert saved <= there <= done, (saved, there, done)
    lost.append(done - there)
assert there > 0, "no session reached a save"
forked(run, None, there + 3)
forked(home / "whole", None, there + 3)
for group in ("model", "optimizer"):
    a, b = (store.read_tensors(store.newest(home / name), group) for name in ("killed", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
print(json.dumps({"kills": kills, "amid a save": torn, "steps": there, "steps lost": sum(lost), "at most": max(lost)}))
"""


@pytest.mark.fault("T4", "T6")
@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_instant_loses_what_came_after_its_last_save(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kills: int
) -> None:
    """However often it was killed, its weights are in the end those of a run that never was, bit for bit."""
    words = [
        sys.executable,
        "-c",
        KILLS,
        str(corpus),
        str(tmp_path),
        str(kills),
        *SPACES,
        "train.checkpoint_every_minutes=0.002",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout.strip()}")


# --- disks and directories --------------------------------------------------------------------------------------------


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes free."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return filler


@pytest.mark.fault("T9")
def test_a_training_on_a_disk_that_fills_up_ends_with_5_and_goes_on_with_room(
    corpus: Path, small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first save finds room for itself alone, and says so; the second does not."""
    config = ["train.checkpoint_every_minutes=1e-9", "train.dropout=0"]
    words = [*command(corpus, small_disk / "run", 4, PLAIN)[3:], "--force"]  # else it is refused before it begins
    words += [word for s in config for word in ("--set", s)]
    at = words.index("--steps") + 1
    assert cli([*words[:at], "1", *words[at + 1 :]]) == 0
    run = small_disk / "run"
    before, size = held(run), sum(file.stat().st_size for file in store.newest(run).iterdir())
    filler = fill(small_disk, size // 2)
    capfd.readouterr()
    assert cli(words) == 5
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bytelm: resource: cannot save step 2") and "make room" in line
    assert not list(run.rglob("*tmp*")) and same(before, held(run))
    filler.unlink()
    filler = fill(small_disk, size * 3 // 2)
    assert cli(words) == 5  # one fits, two do not
    said = capfd.readouterr().err
    assert re.search(r"the disk of .*run has .*B free, a checkpoint takes .*B\n", said)
    filler.unlink()
    assert cli(words) == 0
    train([corpus], configure("byte-tiny", sets=[*PLAIN, *config], steps=4), tmp_path / "through", quiet=True)
    assert store.read_state(store.newest(run))["step"] == 4
    assert same(held(run), held(tmp_path / "through"))


@pytest.mark.fault("T9")
def test_a_file_that_finds_no_room_leaves_the_one_before_and_nothing_beside_it(small_disk: Path) -> None:
    write_whole(small_disk / "a", b"before")
    with pytest.raises(ResourceError, match=r"cannot write .*/a \(No space left on device\): make room"):
        write_whole(small_disk / "a", bytes(2_000_000))
    assert (small_disk / "a").read_bytes() == b"before" and len(list(small_disk.iterdir())) == 1


WRITTEN = ["config.toml", "recipe.toml", "boundaries-", "metrics.jsonl", "held_out.json", "model.json", "report.html"]


@pytest.mark.fault("T9")
@pytest.mark.parametrize("refused", WRITTEN)
def test_whatever_file_the_disk_has_no_room_for_it_is_one_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], refused: str
) -> None:
    run = tmp_path / "run"
    words = command(corpus, run, 2, SPACES)[3:]
    opened = io.open

    def full(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if set(mode) & set("wax+") and isinstance(file, str | Path) and Path(file).name.startswith(refused):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return opened(file, mode, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", full)
        assert cli([*words, "--quiet"]) == 5
    line = capfd.readouterr().err.strip()
    assert "bytelm: resource: " in line and refused in line and "No space left" in line and "\n" not in line
    assert not [file for file in run.rglob("*.tmp")]
    assert cli([*words, "--quiet"]) == 0


@pytest.mark.fault("T10")
def test_a_run_on_a_disk_that_cannot_be_written(
    corpus: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*command(corpus, small_disk / "run", 2, PLAIN)[3:], "--quiet", "--force"]
    assert cli(words) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for run in ("run", "another"):
        words[words.index("--run") + 1] = str(small_disk / run)
        assert cli(words) == 5
        line = capfd.readouterr().err.strip()
        assert "bytelm: resource: " in line and "Read-only file system" in line and "\n" not in line
    assert cli(["generate", str(small_disk / "run"), "a", "--max-bytes", "2"]) == 0  # to read is enough for that


@pytest.mark.fault("T10")
def test_a_run_that_vanishes_ends_with_5(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, step = tmp_path / "run", loop.Trainer.step

    def vanishes(self: loop.Trainer) -> None:
        if self.progress.step == 2:
            shutil.rmtree(run)
        step(self)

    monkeypatch.setattr(loop.Trainer, "step", vanishes)
    assert cli([*command(corpus, run, 4, PLAIN)[3:], "--quiet"]) == 5
    line = capfd.readouterr().err.strip()
    assert "No such file or directory" in line and "\n" not in line and not run.exists()


HOLDER = """
import sys
from pathlib import Path
from bytelm.checkpoint.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.fault("T10")
def test_two_jobs_in_one_run(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second ends at once and names the first; that one killed, the same command goes on."""
    run = tmp_path / "run"
    run.mkdir()
    words = [*command(corpus, run, 2, PLAIN)[3:], "--quiet"]
    holder = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        assert cli(words) == 5
        assert f"resource: {run} is in use by pid {first.pid} on host" in capfd.readouterr().err
        assert [file.name for file in run.iterdir()] == ["lock"]
        first.kill()
    assert cli(words) == 0


# --- odd surroundings -------------------------------------------------------------------------------------------------


@pytest.mark.fault("T11")
def test_a_clock_that_jumps_changes_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day is not asked at all; a day back and a day on, and the budget of minutes is as it was."""
    jumps = itertools.cycle([0.0, -86400.0, 86400.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    config = configure("byte-tiny", sets=[*PLAIN, "train.checkpoint_every_minutes=0.001"], minutes=0.01)
    result = train([corpus], config, tmp_path / "run", quiet=True)
    assert result.progress is not None and 0.6 <= result.progress.seconds < 60
    assert all(line["bytes_per_second"] > 0 for line in of_kind(tmp_path / "run", "train"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train([corpus], configure("demo", sets=SPACES, steps=2), run, quiet=True)
    return run


ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


VERBS = """
import json, os, sys
from bytelm.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main([os.fsdecode(word.encode()) for word in words])  # as the system gives them
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
"""


@pytest.mark.fault("T11")
def test_a_terminal_of_ascii(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Text that it cannot show is shown escaped, in no terminal, and files are read and written as ever."""
    text = tmp_path / "né.txt"
    text.write_text("déjà vu → 語\n" * 50, encoding="utf-8")
    words = [
        command(text, tmp_path / "é", 2, SPACES)[3:],
        ["generate", str(trained), "déjà", "--max-bytes", "60", "--utf8", "--seed", "3"],
        ["patches", str(trained), "déjà vu → 語"],
        ["eval", str(trained), str(text)],
    ]
    command_line = [sys.executable, "-c", VERBS, json.dumps(words)]
    done = subprocess.run(command_line, env=os.environ | ASCII, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stderr.isascii() and b"Traceback" not in done.stderr
    assert rb"\u8a9e" in done.stdout and (tmp_path / "é" / "report.html").exists()


CLOSED = ["1>&- 2>&-", "| true"]
MORE = ["1>&-", "2>&-", "2>&1 >/dev/null | head -1"]


@pytest.mark.fault("T11")
@pytest.mark.parametrize("closed", [*CLOSED, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)])
def test_closed_output(corpus: Path, tmp_path: Path, closed: str) -> None:
    run = tmp_path / "run"
    words = ["bash", "-c", f'set -o pipefail; "$@" {closed}', "-", *command(corpus, run, 30, PLAIN)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr and store.read_state(store.newest(run))["step"] == 30
    assert (run / "report.html").exists()


@pytest.mark.fault("T11")
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "a terminal that went away"), ValueError()])
def test_whoever_listened_may_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stderr", Gone())
    journal = Journal(tmp_path / METRICS)
    journal.progress("a line", force=True)
    journal.say("another")
    journal.write("train", step=1)
    assert journal.quiet and [line["step"] for line in read_metrics(journal.path)] == [1]


@pytest.mark.fault("T11")
def test_a_table_for_a_reader_that_left_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich itself would end the process with 1; our own word for it is the one of `cli.run`, which ends with 0."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        print_table(["name", "figure"], [("a", "1")])


@pytest.mark.fault("T13")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("config", "steps"),
    [(PLAIN, 300), pytest.param(SPACES, 2000, marks=pytest.mark.slow)],
    ids=["short", "two thousand steps"],
)
def test_memory_stays_level(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: list[str], steps: int
) -> None:
    """Of the second half of the steps, with looks and saves among them, a line through the memory used is flat."""
    used: list[int] = []
    step = loop.Trainer.step

    def watched(self: loop.Trainer) -> None:
        step(self)
        if self.progress.step % (steps // 8) == 0:
            self.validate(StopRequest())
            self.save()
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    monkeypatch.setattr(loop.Trainer, "step", watched)
    train([corpus], configure(preset_of(config), sets=config, steps=steps), tmp_path / "run", quiet=True)
    late = np.array(used[steps // 2 :], float)
    gradient = float(np.polyfit(np.arange(len(late)), late, 1)[0])
    print(f"{gradient:.0f} B a step over {len(late)} steps, of {late[-1] / 1e6:.0f} MB")
    assert gradient * len(late) < 8e6, f"{gradient:.0f} B a step"


# --- another configuration --------------------------------------------------------------------------------------------


@pytest.mark.fault("C4")
def test_what_may_change_changes_and_what_may_not_is_named(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    steps = 2

    def said(*more: str, code: int = 0) -> str:
        words = command(corpus, run, steps, PLAIN)[3:]
        assert cli([*words, *more]) == code
        return capfd.readouterr().err

    said()
    assert "changed" not in said("--set", "train.eval_bytes=100")  # free: how it looks, not how it learns
    steps, changed = 4, ["--set", "train.learning_rate=0.01", "--set", "train.batch=3"]
    line = said(*changed, "--allow-change", "train.batch", code=2)
    assert "train.learning_rate was 0.001, now 0.01" in line and "train.batch was" not in line
    assert "--allow-change" in line and line.count("\n") == 1
    told = said(*changed, "--allow-change", "train.batch", "--allow-change", "train.learning_rate")
    assert "changed: train.batch was 2, now 3" in told and "changed: train.learning_rate" in told
    assert store.read_state(store.newest(run))["step"] == 4
    assert load_toml(run / "config.toml")["train"]["learning_rate"] == 0.01
    said(*changed)  # it is the run's own now
    before = held(run)
    for key in ("model.dim", "data.seed", "entropy_model_train.steps", "train", "train.learning_rat"):
        line = said("--set", "model.dim=32", "--allow-change", key, code=2)
        assert (
            f"unknown key of --allow-change '{key}'" in line and f"--init-from {run}" in line and line.count("\n") == 1
        )
    assert "did you mean 'train.learning_rate'?" in line
    assert "model.dim was 16, now 32" in said("--set", "model.dim=32", code=2)
    assert same(before, held(run))
