"""Threads: commands set how they wait before torch is loaded, libraries never; one computes where others hold it up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from bytelm import machine, threads
from bytelm.checkpoint.assemble import load
from bytelm.decoding import why_plain
from bytelm.evaluate import windows
from bytelm.evaluate.bits import measure
from bytelm.machine import POLICY, WAITING, wait_without_spinning
from bytelm.testing.tiny import tiny_models
from bytelm.threads import TRIAL, StepThreads, ThroughputTuner, all_or_one
from bytelm.training.run import train
from trainings import tiny

# --- how they wait ----------------------------------------------------------------------------------------------------

# What the variable is at the moment at which torch begins to be imported.
WATCHED = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("at torch:", os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
"""
COMMAND = "import bytelm.cli\nassert 'torch' not in sys.modules\nbytelm.cli.main(['doctor'])"
LIBRARY = "import bytelm\nbytelm.train\nprint('after:', os.environ.get('GOMP_SPINCOUNT'))"


def ran(program: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | variables
    return subprocess.run(
        [sys.executable, "-c", WATCHED + program], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' OpenMP is left alone")
def test_a_command_has_threads_sleep_before_torch_is_loaded_and_the_doctor_says_so() -> None:
    out = ran(COMMAND)
    assert "at torch: 1000" in out
    assert "GOMP_SPINCOUNT=1000" in next(line for line in out.splitlines() if line.startswith("variables"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_WAIT_POLICY", "ACTIVE"),
        pytest.param("GOMP_SPINCOUNT", "77", marks=pytest.mark.slow),
        pytest.param("KMP_BLOCKTIME", "1", marks=pytest.mark.slow),
    ],
)
def test_what_the_user_chose_is_left_and_shown(name: str, value: str) -> None:
    out = ran(COMMAND, **{name: value})
    assert f"at torch: {value if name == POLICY else None}" in out
    assert f"{name}={value}" in out


def test_a_library_leaves_it_to_its_program() -> None:
    out = ran(LIBRARY)
    assert "at torch: None" in out and "after: None" in out


def test_nothing_is_set_where_torch_is_loaded_or_openmp_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    wait_without_spinning()
    assert POLICY not in os.environ and machine.spinning()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "platform", "darwin")
    wait_without_spinning()
    assert POLICY not in os.environ
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(POLICY, "")  # set to nothing is not set
    wait_without_spinning()
    assert os.environ[POLICY] == "1000" and not machine.spinning()
    monkeypatch.setenv(POLICY, "100000")
    assert machine.spinning()
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert not machine.spinning()


# --- how many compute -------------------------------------------------------------------------------------------------


class Clock:
    """Time as a machine of two cores would have it: `seconds` of a step with so many threads, and its share at work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.worked = 0.0
        self.seconds: Callable[[int], float] = lambda count: 1.0 / count
        self.share = 1.0
        self.used: list[int] = []
        self.count = 2
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "thread_time", lambda: self.worked)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.count)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "count", count))
        for name in (*WAITING, threads.NUMBER):
            monkeypatch.delenv(name, raising=False)

    def compute(self) -> None:
        """One step."""
        self.used.append(self.count)
        took = self.seconds(self.count)
        self.now, self.worked = self.now + took, self.worked + took * self.share

    def run(self, chosen: StepThreads, steps: int, size: int = 1) -> list[int]:
        """The threads of some steps."""
        self.used = []
        for _ in range(steps):
            with chosen.step(size):
                self.compute()
            assert self.count == 2
        return self.used

    def quiet(self) -> None:
        self.seconds, self.share = lambda count: 1.0 / count, 0.95

    def busy(self) -> None:
        """Threads that wait for each other take ten times as long as one."""
        self.seconds, self.share = lambda count: 10.0 if count == 2 else 1.0, 0.3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_one_thread_is_taken_where_others_are_held_up_and_left_again() -> None:
    chosen = all_or_one(2)
    speed = {2: 10.0, 1: 6.0}
    used = list[int]()
    for turn in range(3000):
        if turn in (300, 1000):
            speed[2] = 0.1 if turn == 300 else 10.0
        used.append(chosen.option)
        chosen.note(1 / speed[chosen.option], 1)
    assert used[:300].count(1) < 8
    assert used[600:1000].count(2) < 8
    assert used[-500:].count(1) < 5


def test_steps_follow_a_machine_that_gets_busy_and_quiet(clock: Clock) -> None:
    chosen = StepThreads()
    clock.quiet()
    assert clock.run(chosen, 2000) == [2] * 2000  # not even tried: sums stay what they are
    clock.busy()
    used = clock.run(chosen, 600)
    assert used[:TRIAL] == [2] * TRIAL and used[TRIAL:].count(2) < 8
    clock.quiet()
    assert clock.run(chosen, 1200)[-500:] == [2] * 500


def test_single_slow_steps_start_no_trial(clock: Clock) -> None:
    chosen = StepThreads()
    for _ in range(100):
        clock.busy()
        assert clock.run(chosen, TRIAL - 1) == [2] * (TRIAL - 1)
        clock.quiet()
        assert clock.run(chosen, 1) == [2]


def test_less_than_three_times_as_fast_is_not_worth_other_sums(clock: Clock) -> None:
    clock.seconds, clock.share = lambda count: 2.5 if count == 2 else 1.0, 0.3
    used = clock.run(StepThreads(), 2000)
    assert 0 < used.count(1) < 12


def test_bytes_count_and_not_steps(clock: Clock) -> None:
    """The step of the trial is twenty times as long, and has twenty times as much to do."""
    clock.busy()
    chosen = StepThreads()
    clock.run(chosen, TRIAL)
    clock.seconds = lambda count: 20.0
    assert clock.run(chosen, 1, size=20) == [1]
    assert chosen.tuner is not None and chosen.tuner.best == 1


@pytest.mark.parametrize("fixed", ["not adaptive", "OMP_NUM_THREADS", POLICY, "one thread"])
def test_the_number_may_be_fixed(clock: Clock, monkeypatch: pytest.MonkeyPatch, fixed: str) -> None:
    if fixed in ("OMP_NUM_THREADS", POLICY):
        monkeypatch.setenv(fixed, "2")
    if fixed == "one thread":
        clock.count = 1
    clock.busy()
    chosen = StepThreads(fixed != "not adaptive")
    for _ in range(100):
        with chosen.step():
            clock.compute()
    assert set(clock.used) == {1 if fixed == "one thread" else 2}


def test_the_number_is_put_back_after_an_error_and_the_step_not_counted(clock: Clock) -> None:
    clock.busy()
    chosen = StepThreads()
    clock.run(chosen, TRIAL)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"), chosen.step():
            assert clock.count == 1
            clock.compute()
            raise ValueError("no")
        assert clock.count == 2
    assert clock.run(chosen, 3, size=0) == [1, 1, 1]  # validation takes what is chosen, and is not counted either
    assert chosen.tuner is not None and chosen.tuner.queue == [1]


# --- where they are asked ---------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """What is computed in steps: whether their number may change, and their sizes."""
    found = list[tuple[bool, int]]()
    begin, step = StepThreads.__init__, StepThreads.step

    def begun(self: StepThreads, adaptive: bool = True) -> None:
        begin(self, adaptive)
        self.asked = adaptive  # pyright: ignore

    def stepped(self: StepThreads, size: int = 1) -> AbstractContextManager[None]:
        found.append((self.asked, size))  # pyright: ignore
        return step(self, size)

    monkeypatch.setattr(StepThreads, "__init__", begun)
    monkeypatch.setattr(StepThreads, "step", stepped)
    return found


def test_training_and_evaluation_ask(
    tmp_path: Path, steps: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The patches of a byte model. " * 200, encoding="utf-8")
    train([text], tiny(steps=3), tmp_path / "run", quiet=True)
    assert steps.count((True, 1)) == 3
    model = load(tmp_path / "run").model
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(windows, "open_reader", lambda model, **shape: None)  # the forward pass
        list(measure(model, [("", b"abcdefghij")], context=4, stride=2, batch=3))
    assert steps == [(True, 3), (True, 1)]


def test_kernels_that_evaluate_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dict(tiny_models())["transformer (windowed)"]
    if why_plain(model):
        pytest.skip("no kernels")
    noted: list[int] = []
    monkeypatch.setattr(ThroughputTuner, "note", lambda self, seconds, written: noted.append(written))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    list(measure(model, [("", b"abcdefghij")], context=4, stride=2, batch=3))
    assert noted == [3, 3]
