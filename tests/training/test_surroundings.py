"""Clocks that jump, terminals of ASCII, output that is closed, and memory that stays level."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bytelm.checkpoint import store
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.cli.common import print_table
from bytelm.training import loop
from bytelm.training.journal import Journal
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.stop import StopRequest
from trainings import PLAIN, SPACES, command, of_kind, preset_of


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


@pytest.mark.parametrize(
    ("sets", "epochs", "said"),
    [
        (PLAIN, 4, None),
        (PLAIN, 9, "caution: 9 epochs, and more than 4 add little: give more files"),
        (SPACES, 1, None),
        (SPACES, 2, "caution: 2 epochs, and n-gram tables overfit what they read again: give more files"),
    ],
)
def test_a_budget_that_reads_the_files_too_often_is_told_before_it_does(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    sets: list[str],
    epochs: int,
    said: str | None,
) -> None:
    (tmp_path / "text").mkdir()
    for n in range(10):
        (tmp_path / "text" / str(n)).write_text(f"{n}123456789\n" * 20)
    config = configure(preset_of(sets), sets=[*sets, "data.valid=0.1", "data.test=0", f"train.bytes={epochs * 1980}"])
    told: list[str] = []
    line = loop.Trainer.line
    monkeypatch.setattr(loop.Trainer, "line", lambda *given: told.append(line(*given)) or told[-1])
    train([tmp_path / "text"], config, tmp_path / "run")
    lines = capfd.readouterr().err.splitlines()
    assert "(epoch" not in told[0] and (f"(epoch {epochs})" in told[-1]) == (epochs > 1)
    assert [line.partition(", or")[0] for line in lines if line.startswith("caution")] == ([said] if said else [])


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
