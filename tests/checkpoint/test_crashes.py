"""A save that is killed, or that the disk refuses, leaves what was there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelm.checkpoint import store
from bytelm.checkpoint.lock import exclusive
from bytelm.errors import ResourceError
from checkpoints import holds, names, save

# ---- kills ----


# One process pays for importing torch; each trial is a fork of it that is killed. `content` is that above.
CRASHES = r"""
import os, random, signal, sys, time
from pathlib import Path
import torch
from bytelm.checkpoint import store
kind, size, run = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def content(step):
    return {"model": {"a": torch.full((size,), step)}, "optimizer": {"m": torch.full((2 * size,), step / 7)}}

def check(steps):
    for path in store.checkpoints(run):
        store.verify(path)
    path = store.newest(run)
    step = store.read_state(path)["step"]
    assert step in steps, (step, steps)
    for group, tensors in content(step).items():
        found = store.read_tensors(path, group)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    return step

def forked(work, wait):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(3)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

def any_instant():
    "Killed at random times of a loop of saves; a pipe tells which save had returned."
    random.seed(1)
    last = 0
    store.save(run, 0, content(0), {})
    torn = 0
    for _ in range(15):
        reader, writer = os.pipe()
        def work():
            for step in range(last + 1, last + 10_000):
                store.save(run, step, content(step), {})
                os.write(writer, step.to_bytes(8, "little"))
        assert forked(work, random.uniform(0, 0.1)) == signal.SIGKILL
        os.close(writer)
        told = os.fdopen(reader, "rb").read()
        done = int.from_bytes(told[-8:], "little") if told else last
        torn += len(list((run / "checkpoints").glob("*.tmp-*")))
        last = check({done, done + 1})
    assert torn, "no kill fell into a save"
    store.save(run, last + 1, content(last + 1), {})
    assert not list((run / "checkpoints").glob("*.tmp-*"))

def every_call():
    "Killed before the n-th thing it asks of the file system, for every n."
    os.fsync = lambda descriptor: None  # a kill is no power cut
    killed_before_every_call([5])  # the only checkpoint is replaced
    killed_before_every_call([3, 4])  # another is added, the oldest goes

def killed_before_every_call(there):
    def work():
        left = limit
        def hook(event, args):
            nonlocal left
            if event.startswith(("os.", "open", "shutil.")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        store.save(run, 5, content(5), {"try": 2})
    for limit in range(1, 1000):
        for path in run.iterdir():
            store.shutil.rmtree(path)
        for step in there:
            store.save(run, step, content(step), {"try": 1})
        status = forked(work, None)
        check({there[-1], 5})
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        store.save(run, 6, content(6), {})
        check({6})
        assert not list((run / "checkpoints").glob("*.tmp-*"))
    assert limit > 20, limit

{"any instant": any_instant, "every call": every_call}[kind]()
"""


@pytest.mark.fault("T4")
@pytest.mark.parametrize(("kind", "size"), [("any instant", 100_000), ("every call", 100)])
def test_a_killed_save_harms_nothing(tmp_path: Path, kind: str, size: int) -> None:
    command = [sys.executable, "-c", CRASHES, kind, str(size), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault("T5")
def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int | str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def spy_fsync(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def spy(move: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def spied(source: Any, target: Any) -> None:
            events.append(("move", Path(target).name))
            move(source, target)

        return spied

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy(rename))
    monkeypatch.setattr(os, "replace", spy(replace))
    path = save(tmp_path, 1)
    moved, pointed = events.index(("move", path.name)), events.index(("move", "latest"))
    before, between, after = events[:moved], events[moved:pointed], events[pointed:]
    assert {("sync", p.stat().st_ino) for p in [path, *path.iterdir(), tmp_path, path.parent / "latest"]} <= set(before)
    order = [e for e in before if e in {("sync", p.stat().st_ino) for p in [path, *path.iterdir()]}]
    assert order[-2:] == [("sync", (path / "MANIFEST.json").stat().st_ino), ("sync", path.stat().st_ino)]
    assert ("sync", path.parent.stat().st_ino) in between and ("sync", path.parent.stat().st_ino) in after


# ---- refusing disks ----


@pytest.mark.fault("T9")
@pytest.mark.parametrize("refused", range(6))
def test_an_error_of_the_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    save(tmp_path, 1)
    left = refused
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"step-00000002: No space left on device; it needs \d+ B") as caught:
        save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert holds(store.newest(tmp_path), 1)


@pytest.mark.fault("T9")
def test_a_full_disk(small_disk: Path) -> None:
    save(small_disk, 1)
    with pytest.raises(ResourceError, match=r"step-00000002: No space left on device; it needs 2\.\d+ MB"):
        store.save(small_disk, 2, {"model": {"a": torch.ones(30_000), "b": torch.ones(500_000)}}, {})
    assert names(small_disk) == ["latest", "step-00000001"]
    assert holds(store.newest(small_disk), 1)
    assert holds(save(small_disk, 2), 2)


@pytest.mark.fault("T10")
def test_a_run_that_vanished_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No such file"):
        save(tmp_path / "gone", 1)
    with pytest.raises(ResourceError, match="No such file"), exclusive(tmp_path / "gone"):
        pass
    assert list(tmp_path.iterdir()) == []
