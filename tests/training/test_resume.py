"""A run goes on as if it had not stopped, whatever it was killed by; another configuration is refused or taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bytelm.checkpoint import store
from bytelm.cli import run as cli
from bytelm.config import load_toml
from bytelm.find import names
from bytelm.training import loop
from bytelm.training.run import train
from bytelm.training.settings import configure
from small import BLT, TRAINED
from trainings import PLAIN, SPACES, command, held, of_kind, same

# --- going on ---------------------------------------------------------------------------------------------------------


STAGES_OF_TWO = ["model.sizes=[8]", "model.dims=[32,16]", "model.layers=[1,1]", "model.heads=[2,2]"]
TABLES = ["model.ngram_sizes=[3]", "model.ngram_rows=64"]
ACROSS = ["model.local_window=12", *TABLES, "model.reach=0"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "transformer": ("byte-tiny", PLAIN),
    "linear": ("byte-tiny", ["model.name=linear", *PLAIN]),
    "perceiver": ("byte-tiny", ["model.name=perceiver", "model.latents=16", *PLAIN]),
    "megabyte": ("megabyte-tiny", [*STAGES_OF_TWO, *TRAINED]),
    "megabyte across patches": ("megabyte-tiny", [*STAGES_OF_TWO, *ACROSS, *TRAINED]),
    "megabyte_pytorch": (
        "megabyte-tiny",
        ["model.name=megabyte_pytorch", *STAGES_OF_TWO, "model.head_dims=[16,8]", "model.ffn=[2,2]", *TRAINED],
    ),
    "blt": ("demo", [*BLT, *TRAINED]),
    "hnet": (
        "hnet-tiny",
        ["model.dims=[16,32]", "model.heads=[2,2]", "model.decoder_layers=[1]", "model.layers=1", *TABLES, *TRAINED],
    ),
    "tokens": ("bpe-tiny", [*PLAIN, "model.vocabulary=300"]),
}
QUICK = ("megabyte", "blt")


@pytest.mark.fault("T6")
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_every_architecture_goes_on_as_if_it_had_not_stopped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Amid an epoch, with steps of several batches and with dropout; weights, moments and losses bit for bit."""
    assert set(KINDS) - {"tokens", "megabyte across patches"} == set(names("models"))
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
    def saved(self, last=False):
        save(self, last)
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
run, lost, torn, there, most = home / "killed", [], 0, 0, 0.8
for _ in range(kills):
    done, saved = forked(run, rng.uniform(0.1, most))
    most *= 1 if there or saved else 2  # where a machine takes longer to begin
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
