"""Loggers are told what metrics.jsonl is told, and none of them can stop a training."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.cli import run as cli
from bytelm.errors import MissingExtraError, UsageError
from bytelm.training import loggers
from bytelm.training.config import RunConfig
from bytelm.training.loggers import Loggers, names_in
from bytelm.training.run import train
from bytelm.training.settings import configure

TINY = [
    "model.name=transformer",
    "model.layers=1",
    "model.dim=16",
    "model.heads=2",
    "train.context_length=64",
    "train.batch=2",
]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches out, and nothing is written outside the test's folder."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB__SERVICE_WAIT": "120",  # seconds for its other process to start, on a busy machine
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(b"".join(b"line %d of a text that is learnt\n" % n for n in range(900)))
    return path


def tiny(steps: int) -> RunConfig:
    return configure("byte-tiny", sets=[*TINY, "train.eval_every_minutes=1e-9", "train.sample_bytes=0"], steps=steps)


def told(run: Path, kind: str = "validation") -> list[tuple[int, float]]:
    """What metrics.jsonl says: steps and bits per byte."""
    return [(m["step"], m["bits_per_byte"]) for m in read_metrics(run / METRICS) if m["kind"] == kind]


class Recorder:
    """A logger in memory, which fails when asked to."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.broken_from = 10**9
        self.lost: int | None = None
        """How many of the newest lines are forgotten when it is asked what it has; None: it cannot tell."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.broken_from:
            raise ConnectionError("the disk of the server is full\nand more")
        self.lines.append((step, dict(values)))

    def held(self) -> Mapping[str, int] | None:
        return None if self.lost is None else loggers.latest(self.lines)

    def close(self) -> None:
        self.closed = True

    def of(self, kind: str) -> list[tuple[int, float]]:
        name = f"{kind}/bits_per_byte"
        return [(step, values[name]) for step, values in self.lines if name in values]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(loggers.KNOWN, "recorder", lambda run, config: made)
    return made


def test_a_logger_is_told_what_the_metrics_hold(tmp_path: Path, corpus: Path, recorder: Recorder) -> None:
    train([corpus], tiny(4), tmp_path / "run", quiet=True, log=["recorder"])
    for kind in ("train", "validation"):
        assert recorder.of(kind) == told(tmp_path / "run", kind) != []
    names = {name for _, values in recorder.lines for name in values}
    assert {"train/learning_rate", "train/bytes", "validation/bits_per_byte"} <= names
    assert not any(name.endswith("/step") for name in names)
    assert recorder.closed


def test_a_resumed_training_tells_nothing_twice(tmp_path: Path, corpus: Path, recorder: Recorder) -> None:
    train([corpus], tiny(3), tmp_path / "run", quiet=True, log=["recorder"])
    metrics = tmp_path / "run" / METRICS
    with metrics.open("a") as file:  # the sitting went on to step 4, which is lost, and computed again
        file.write('{"kind": "validation", "step": 4, "bits_per_byte": 5.5}\n')
    train([corpus], tiny(6), tmp_path / "run", quiet=True, log=["recorder"])
    steps = [step for step, _ in recorder.of("validation")]
    assert steps == sorted(set(steps)) and 4 not in steps and {3, 5, 6} <= set(steps)
    assert {4, 5, 6} <= {step for step, _ in told(tmp_path / "run")}


@pytest.mark.parametrize("lost", [0, 1, 3, 99])
def test_what_a_logger_lost_is_sent_again(tmp_path: Path, corpus: Path, recorder: Recorder, lost: int) -> None:
    """Loggers buffer, and `kill -9` takes what is in there; 99: one that is told of the run for the first time."""
    run = tmp_path / "run"
    train([corpus], tiny(4), run, quiet=True, log=["recorder"])
    recorder.lost = lost
    del recorder.lines[max(0, len(recorder.lines) - lost) :]
    train([corpus], tiny(6), run, quiet=True, log=["recorder"])
    for kind in ("train", "validation"):
        assert recorder.of(kind) == told(run, kind)


def test_what_a_logger_has_beyond_the_journal_is_not_sent_twice(
    tmp_path: Path, corpus: Path, recorder: Recorder
) -> None:
    """A sitting that began at an older checkpoint, and was killed before it came as far as the one before it."""
    run = tmp_path / "run"
    train([corpus], tiny(3), run, quiet=True, log=["recorder"])
    recorder.lost = 0
    recorder.lines.append((5, {"validation/bits_per_byte": 5.5}))
    train([corpus], tiny(6), run, quiet=True, log=["recorder"])
    steps = [step for step, _ in recorder.of("validation")]
    assert len(steps) == len(set(steps)) and {1, 2, 3, 5, 6} <= set(steps)


@pytest.mark.fault("T12")
def test_a_failing_logger_is_told_of_once_and_the_training_goes_on(
    tmp_path: Path,
    corpus: Path,
    recorder: Recorder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Recorder()
    monkeypatch.setitem(loggers.KNOWN, "other", lambda run, config: other)
    recorder.broken_from = 2
    result = train([corpus], tiny(5), tmp_path / "run", log=["recorder", "other"])
    assert result.progress is not None and result.progress.step == 5
    said = [line for line in capsys.readouterr().err.splitlines() if "recorder" in line]
    assert len(said) == 1 and "the disk of the server is full" in said[0] and METRICS in said[0]
    assert recorder.of("validation") == told(tmp_path / "run")[:1] and not recorder.closed
    assert other.of("validation") == told(tmp_path / "run") and other.closed


@pytest.mark.fault("T12")
def test_a_logger_that_cannot_begin(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: Path, config: Mapping[str, object]) -> Recorder:
        raise RuntimeError("no key")

    monkeypatch.setitem(loggers.KNOWN, "broken", broken)
    assert train([corpus], tiny(2), tmp_path / "run", log=["broken"]).signal is None
    assert capsys.readouterr().err.count("broken failed") == 1


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_one_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)  # another test may have it
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtraError, match=rf"--log {name} needs {name}.*pip install 'bytelm\[logs\]'"):
        Loggers([name], tmp_path, {}, [], print)


def test_names() -> None:
    assert names_in(None) == [] and names_in("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
        names_in("tensorbord")


# ---- the real ones


def test_tensorboard_has_the_curves(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        train([corpus], tiny(3), run, quiet=True, log=["tensorboard"])
        train([corpus], tiny(5), run, quiet=True, log=["tensorboard"])
        events = accumulator.EventAccumulator(str(run / "tensorboard"))
        events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("validation/bits_per_byte")]
    assert found == [(step, pytest.approx(bits, rel=1e-6)) for step, bits in told(run)]


@pytest.mark.filterwarnings("ignore")
def test_trackio_has_the_curves(tmp_path: Path, corpus: Path) -> None:
    """In a process of its own: it reads its folder's name when it is imported."""
    pytest.importorskip("trackio")
    run = tmp_path / "run"
    words = [sys.executable, "-m", "bytelm", *command(corpus, run, "trackio"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["step"] == 3  # what trackio says stands elsewhere
    (file,) = (tmp_path / "trackio").glob("bytelm*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    steps = {step for _, step, metrics in rows if b"validation/bits_per_byte" in metrics}
    assert steps == {step for step, _ in told(run)} != set()
    assert {name for name, _, _ in rows} == {f"run-{loggers.identity(run)}"}


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_writes_into_the_run(tmp_path: Path, corpus: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    assert cli(command(corpus, run, "wandb")) == 0
    (file,) = (run / "wandb").glob(f"offline-run-*-{loggers.identity(run)}/run-*.wandb")
    assert b"bits_per_byte" in file.read_bytes()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from bytelm.training.journal import Journal
from bytelm.training.loggers import Loggers

name, run, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run.mkdir(exist_ok=True)
journal = Journal(run / "metrics.jsonl", quiet=True)
journal.loggers = Loggers([name], run, {}, journal.lines, print)
for step in range(first, last + 1):
    journal.write("train", step=step, bits_per_byte=8 / step)
    if step % 5 == 0:
        journal.write("validation", step=step, bits_per_byte=7 / step)
    if step == 30:
        time.sleep(1)  # in which trackio writes what it has
if last == 60:
    os.kill(os.getpid(), signal.SIGKILL)
journal.loggers.close()
"""


def steps_of(name: str, run: Path) -> list[tuple[int, str]]:
    """The steps and names of figures that a logger has, in order."""
    if name == "wandb":
        files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
        return [(s, n) for file in files for s, names in loggers.history(file) for n in names if n[0] != "_"]
    if name == "trackio":
        (file,) = (run.parent / "trackio").glob("bytelm*.db")
        with sqlite3.connect(file) as database:
            rows = database.execute("select step, metrics from metrics order by id").fetchall()
        return [(step, name) for step, metrics in rows for name in json.loads(metrics)]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, tag) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tensorboard", "trackio", pytest.param("wandb", marks=pytest.mark.slow)])
def test_after_kill_9_no_step_is_missing_and_none_is_there_twice(tmp_path: Path, name: str) -> None:
    """All three buffer: ten seconds, half a second, 15 seconds. The journal still has what was lost."""
    pytest.importorskip(name)
    run = tmp_path / "run"
    wanted = [(step, "train/bits_per_byte") for step in range(1, 71)]
    wanted += [(step, "validation/bits_per_byte") for step in range(5, 71, 5)]
    words = [sys.executable, "-c", KILLED, name, str(run)]
    assert subprocess.run([*words, "1", "60"], capture_output=True).returncode == -signal.SIGKILL
    assert len(steps_of(name, run)) < 72  # something is lost, or this test shows nothing
    done = subprocess.run([*words, "61", "70"], capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    assert sorted(steps_of(name, run)) == sorted(wanted)


def command(corpus: Path, run: Path, log: str) -> list[str]:
    sets = [word for setting in [*TINY, "train.eval_every_minutes=1e-9"] for word in ("--set", setting)]
    return [
        "train",
        str(corpus),
        "--preset",
        "byte-tiny",
        *sets,
        "--steps",
        "3",
        "--run",
        str(run),
        "--log",
        log,
        "-q",
    ][:-1]
