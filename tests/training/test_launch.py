"""torchrun on one machine: it restarts what is lost and not what stopped in order, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import worlds
from bytelm.cli import run as cli
from bytelm.training.run import train
from bytelm.training.stop import ELASTIC, SIGNALS, exit_code
from launches import ALL, Launcher, kill, sessions, step_of, torchrun
from trainings import PLAIN, held, same, tiny

SETS = [*PLAIN, "train.batch=4", "train.checkpoint_every_minutes=0.005", "train.timeout_minutes=0.1"]
RESTARTING = ["--nproc-per-node", "2", "--max-restarts", "3", "--standalone", "--signals-to-handle", ALL]


def words(corpus: Path, run: Path, steps: int) -> list[str]:
    sets = [word for setting in SETS for word in ("--set", setting)]
    return ["train", str(corpus), "--preset", "byte-tiny", "--run", str(run), "--steps", str(steps), *sets]


def trained(corpus: Path, run: Path, steps: int) -> None:
    train([corpus], tiny(*SETS, steps=steps), run, quiet=True)


def undisturbed(corpus: Path, run: Path, steps: int, world: int = 2) -> None:
    worlds.run(world, trained, corpus, run, steps)


def at_work(found: Launcher, run: Path, beyond: int = 0) -> None:
    """Wait until all workers are there and a checkpoint after step `beyond` is."""
    found.until(lambda: len(found.workers) == 2 and step_of(run) > beyond)


# --- what is restarted ------------------------------------------------------------------------------------------------


def test_a_stop_in_order_ends_with_0_under_torchrun_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ELASTIC, raising=False)
    assert exit_code(signal.SIGTERM) == 143
    monkeypatch.setenv(ELASTIC, "none")
    assert exit_code(signal.SIGTERM) == 0


@pytest.mark.fault("T3")
def test_a_worker_that_stops_in_order_is_not_restarted(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with torchrun(tmp_path / "log", RESTARTING, words(corpus, run, 100_000)) as found:
        at_work(found, run)
        kill(found.workers[1], signal.SIGTERM)
        assert found.end() == 0, found.said
    assert f"saved step {step_of(run)} in {run}" in found.said and sessions(run) == 1


@pytest.mark.slow
@pytest.mark.fault("T8")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_worker_is_restarted_and_nothing_is_lost(corpus: Path, tmp_path: Path, lost: int) -> None:
    """Twice, the other one the second time: what the first attempt left in the store misleads nobody."""
    run = tmp_path / "run"
    with torchrun(tmp_path / "log", RESTARTING, words(corpus, run, 400)) as found:
        for attempt, rank in enumerate((lost, 1 - lost)):
            at_work(found, run, step_of(run))
            found.until(lambda attempt=attempt: sessions(run) == attempt + 1)
            kill(found.workers[rank])
            found.until(lambda: f"process {rank} of 2 is unresponsive" in found.said)  # noqa: B023
            found.until(lambda attempt=attempt: sessions(run) == attempt + 2)
        assert found.end() == 0, found.said
    undisturbed(corpus, tmp_path / "through", 400)
    assert same(held(run), held(tmp_path / "through"))


@pytest.mark.slow
@pytest.mark.fault("T8")
def test_a_hung_worker_is_named_and_the_restart_resumes(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with torchrun(tmp_path / "log", RESTARTING, words(corpus, run, 400)) as found:
        at_work(found, run)
        kill(found.workers[1], signal.SIGSTOP)
        found.until(lambda: sessions(run) == 2)
        named = [line for line in found.said.splitlines() if line.startswith("bytelm: ")]
        assert named and named[-1].startswith("bytelm: training: process 1 of 2 is unresponsive"), found.said
        assert found.end() == 0, found.said
    undisturbed(corpus, tmp_path / "through", 400)
    assert same(held(run), held(tmp_path / "through"))


@pytest.mark.slow
@pytest.mark.fault("T3")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("whom", ["torchrun", "a worker"])
def test_a_signal_saves_and_ends_all_and_nothing_is_restarted(
    corpus: Path, tmp_path: Path, number: signal.Signals, whom: str
) -> None:
    run = tmp_path / "run"
    with torchrun(tmp_path / "log", RESTARTING, words(corpus, run, 100_000)) as found:
        at_work(found, run)
        kill(found.process.pid if whom == "torchrun" else found.workers[0], number)
        assert found.end() == (1 if whom == "torchrun" else 0), found.said  # torchrun ends with 1 of any signal
    step = step_of(run)
    assert f"saved step {step} in {run}" in found.said and sessions(run) == 1
    with torchrun(tmp_path / "log", RESTARTING, words(corpus, run, 100_000)) as found:
        at_work(found, run, step)
        assert f"resuming from step {step}" in found.said


# --- the doctor -------------------------------------------------------------------------------------------------------


def test_the_doctor_says_what_is_missing_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def lines() -> dict[str, dict[str, str]]:
        assert cli(["doctor", "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    for name in [name for name in os.environ if name.startswith(("TORCH", "GROUP_"))]:
        monkeypatch.delenv(name)
    assert "torchrun" not in lines()
    there = {ELASTIC: "none", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "0"}
    there["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT"
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    found = lines()
    assert found["torchrun"]["found"] == "4 processes on 2 of its hosts, 0 restarts"
    assert "--max-restarts" in found["torchrun"]["advice"]
    assert "--signals-to-handle SIGTERM,SIGINT,SIGUSR1" in found["signals"]["advice"]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in found["store"]["advice"]
    more = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    more["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in SIGNALS)
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    found = lines()
    assert [found[name]["advice"] for name in ("torchrun", "signals", "store", "grace")] == [""] * 4
    monkeypatch.setenv("RANK", "1")
    assert cli(["doctor"]) == 0 and capfd.readouterr().out == ""
