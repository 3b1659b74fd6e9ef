"""Signals at any stage of a training, and at random times: heard, saved, and gone on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelm.cli import run as cli
from bytelm.models.blt.model import BLT as BLT_MODEL
from bytelm.training import loop
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.stages import boundaries, packing, thresholds
from bytelm.training.stop import ELASTIC, StopRequest
from small import BLT, TRAINED
from trainings import PLAIN, command, held, of_kind, same

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
    from bytelm.evaluate.windows import Windows

    words = command(corpus, tmp_path / "run", 2, PLAIN)[3:]
    score = Windows.score

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "score", interrupted)
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


@pytest.mark.fault("T3")
def test_a_signal_that_torchrun_passes_on_as_well_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm and systemd signal the whole job, so that a worker hears it from them and from torchrun."""
    monkeypatch.setenv(ELASTIC, "none")
    left: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: left.append(number))
    try:
        with StopRequest() as stop:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
                assert stop.received == signal.SIGUSR1
        assert not left
        os.kill(os.getpid(), signal.SIGUSR1)
        assert left == [signal.SIGUSR1]  # as before, once nothing is to be saved
    finally:
        signal.signal(signal.SIGUSR1, before)


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
    [pytest.param(PLAIN, 2, marks=pytest.mark.slow), pytest.param([*BLT, *TRAINED], 50, marks=pytest.mark.slow)],
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
