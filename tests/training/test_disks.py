"""Disks that fill up, runs that cannot be written or vanish, two jobs in one run."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import worlds
from bytelm.checkpoint import store
from bytelm.cli import run as cli
from bytelm.data.files import write_whole
from bytelm.errors import ResourceError
from bytelm.training import loop
from bytelm.training.journal import Journal
from bytelm.training.run import train
from bytelm.training.settings import configure
from trainings import PLAIN, SPACES, command, held, same


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


def steps(run: Path) -> list[int]:
    return [store.read_state(path)["step"] for path in store.checkpoints(run)]


def crowded(corpus: Path, run: Path) -> list[str]:
    """What a process says that trains where the disk has a byte left, and saves after each step while it trains on."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1)))
        patch.setattr(Journal, "say", lambda self, line: said.append(f"{line}: {steps(run)}"))
        sets = [*PLAIN, "train.checkpoint_every_minutes=1e-9"]
        train([corpus], configure("byte-tiny", sets=sets, steps=4), run, quiet=True)
    return said


def test_processes_that_save_while_they_train_on_say_once_that_the_disk_is_nearly_full(
    corpus: Path, tmp_path: Path
) -> None:
    first, second = worlds.run(2, crowded, corpus, tmp_path / "run")
    found = [line for line in first if re.search(r"the disk of .*run has 1 B free, a checkpoint takes .*B", line)]
    assert len(found) == 1 and not found[0].endswith("4]") and not any("the disk" in line for line in second)


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
