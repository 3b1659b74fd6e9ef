"""Trainings that commands share: each is trained once, by whoever comes first, and none is lost with who died."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bytelm.compare import cells
from bytelm.compare.cells import Cell, Failure, work_off
from bytelm.data import claims
from bytelm.data.files import write_whole
from bytelm.errors import DataError, DivergenceError
from bytelm.training.journal import Journal
from bytelm.training.stop import Interrupted, StopRequest

QUIET = Journal(None, quiet=True)


def cell(home: Path, number: int, **job: Any) -> Cell:
    (home / "data").mkdir(exist_ok=True)
    return Cell(f"cell-{number}", f"cell {number}", home / f"run-{number}", home / "data", "cell_worker", job)


def tries(one: Cell) -> list[str]:
    return (one.run / "tried").read_text().split()


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    monkeypatch.setattr(cells, "_PAUSE", 0.02)


def command(home: Path, count: int) -> None:
    cells._PAUSE = 0.02
    work_off([cell(home, number, seconds=0.15) for number in range(count)], home, QUIET)


def test_commands_share_the_cells_and_each_is_trained_once(tmp_path: Path) -> None:
    context, count = multiprocessing.get_context("fork"), 8
    commands = [context.Process(target=command, args=(tmp_path, count)) for _ in range(3)]
    for one in commands:
        one.start()
    for one in commands:
        one.join(60)
    assert [one.exitcode for one in commands] == [0, 0, 0]
    by = [tries(cell(tmp_path, number)) for number in range(count)]
    assert all(len(each) == 1 for each in by)
    assert Counter(each[0] for each in by).keys() == {str(one.pid) for one in commands}
    assert not list((tmp_path / "cells").iterdir())


def test_a_command_waits_for_what_another_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cell(tmp_path, 0)
    (tmp_path / "cells").mkdir()
    claim = tmp_path / "cells" / "cell-0.claim-0"
    claim.write_text(json.dumps({"host": socket.gethostname(), "machine": "another", "pid": 1}))
    looks = list[str]()

    def looked(line: str, force: bool = False) -> None:
        looks.append(line)
        if len(looks) == 3:
            one.run.mkdir()
            (one.run / "result.json").write_text("{}")

    journal = Journal(None, quiet=True)
    monkeypatch.setattr(journal, "progress", looked)
    work_off([one], tmp_path, journal)
    assert looks == ["waiting for 1 trainings of other commands"] * 3 and not (one.run / "tried").exists()


def test_a_command_that_is_silent_or_dead_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LOST", 0.2)
    (tmp_path / "cells").mkdir()
    gone = {"host": "far", "machine": "another", "pid": 1}, {"machine": claims.machine(), "pid": 2**22, "id": "a"}
    for number, owner in enumerate(gone):
        (tmp_path / "cells" / f"cell-{number}.claim-0").write_text(json.dumps(owner))
    both = [cell(tmp_path, number) for number in range(2)]
    work_off(both, tmp_path, QUIET)
    assert [len(tries(one)) for one in both] == [1, 1]


def test_failures_are_kept_passed_over_and_tried_again_by_the_next_command(tmp_path: Path) -> None:
    three = [cell(tmp_path, 0, kind="fails"), cell(tmp_path, 1, kind="killed"), cell(tmp_path, 2)]
    work_off(three, tmp_path, QUIET)
    assert [one.done for one in three] == [False, False, True]
    assert three[0].failure == Failure("no luck", diverged=True)
    assert three[1].failure == Failure("it was killed by signal 9") and three[2].failure is None
    work_off(three, tmp_path, QUIET)
    assert [len(tries(one)) for one in three] == [2, 2, 1]
    again = cell(tmp_path, 0)
    work_off([again], tmp_path, QUIET)
    assert again.done and again.failure is None


def test_what_another_command_failed_at_meanwhile_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [cell(tmp_path, number) for number in range(2)]
    train = cells.trained

    def other(one: Cell) -> None:
        two[1].run.mkdir()
        Failure("theirs").write(two[1].run)
        train(one)

    monkeypatch.setattr(cells, "trained", other)
    work_off(two, tmp_path, QUIET)
    assert two[0].done and two[1].failure == Failure("theirs") and not (two[1].run / "tried").exists()


def test_a_failure_says_what_an_error_says(tmp_path: Path) -> None:
    assert Failure.of(DataError("no bytes")) == Failure("no bytes")
    assert Failure.of(DivergenceError("10 steps")) == Failure("10 steps", diverged=True)
    assert Failure.of(KeyError("a")) == Failure("KeyError: 'a'")


def test_commands_may_write_one_report_at_once(tmp_path: Path) -> None:
    """All that waited for the last training write the same files at the same moment."""
    path, texts = tmp_path / "results.json", [bytes([number]) * 100_000 for number in range(4)]
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(lambda number: write_whole(path, texts[number % 4]), range(200)))
    assert path.read_bytes() in texts and list(tmp_path.iterdir()) == [path]


WORKS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from compare.test_cells import QUIET, cell
from bytelm.compare.cells import work_off
from bytelm.training.stop import Interrupted, StopRequest
with StopRequest():
    try:
        work_off([cell(Path({home!r}), 0, seconds=20)], Path({home!r}), QUIET)
    except Interrupted as stopped:
        sys.exit(stopped.signal)
"""


def test_a_signal_reaches_the_training_and_gives_the_cell_back(tmp_path: Path) -> None:
    code = WORKS.format(tests=str(Path(__file__).parents[1]), home=str(tmp_path))
    job = subprocess.Popen([sys.executable, "-c", code])
    tried, deadline = tmp_path / "run-0" / "tried", time.monotonic() + 60
    while not tried.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == signal.SIGTERM
    assert not list((tmp_path / "cells").iterdir()) and not (tmp_path / "run-0" / "result.json").exists()


def test_a_signal_while_waiting_ends_the_wait(tmp_path: Path) -> None:
    one = cell(tmp_path, 0)
    with StopRequest() as request:
        request.received = signal.SIGINT
        with pytest.raises(Interrupted):
            work_off([one], tmp_path, QUIET)
    assert not one.run.exists()
