"""Saves of two processes of which one is killed at some call of the file system; for a process that may fork."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bytelm.checkpoint import sharded, store, writing
from shardings import placed, whole

PATIENCE = timedelta(seconds=30)
ERROR = 3  # how a process ends whose save is an error


def at_every_call(run: Path, there: list[int], stride: int) -> list[int]:
    """Step 5 is saved over steps `there`, and one process is killed before the n-th thing it asks of the file system.

    For every n that is a multiple of `stride`, in each of the two. Returns how many calls each has, or more.
    """
    return [_victim(run, there, victim, itertools.count(stride, stride)) for victim in range(2)]


def _victim(run: Path, there: list[int], victim: int, limits: Iterator[int]) -> int:
    for limit in limits:
        for path in run.iterdir():
            shutil.rmtree(path)
        for step in there:
            store.save(run, step, whole(step), {})
        ends = _forked(run, victim, limit)
        for path in store.checkpoints(run):
            store.verify(path)
        found = store.newest(run)
        step = store.read_state(found)["step"]
        assert step in ({5} if ends == [0, 0] else {there[-1], 5}), (ends, step)
        for group, tensors in whole(step).items():
            read = store.read_tensors(found, group)
            assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        if ends[victim] == 0:
            return limit
        assert ends[victim] == -signal.SIGKILL and ends[1 - victim] in (0, ERROR), ends
        store.save(run, 6, whole(6), {})
        assert not list((run / "checkpoints").glob("*.tmp-*"))
    raise AssertionError


def _forked(run: Path, victim: int, limit: int) -> list[int]:
    """How two processes end that save step 5."""
    children: list[int] = []
    with tempfile.TemporaryDirectory() as meeting:
        for rank in range(2):
            if (child := os.fork()) == 0:
                code = ERROR
                with contextlib.suppress(Exception):
                    _saves(run, Path(meeting) / "store", rank, limit if rank == victim else 0)
                    code = 0
                os._exit(code)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _saves(run: Path, meeting: Path, rank: int, limit: int) -> None:
    """Save, and be killed before call number `limit`; 0: live."""
    dist.init_process_group("gloo", store=dist.FileStore(str(meeting), 2), rank=rank, world_size=2, timeout=PATIENCE)
    mesh = DeviceMesh("cpu", torch.arange(2))
    tensors, group, left, put = placed(whole(5), mesh), dist.new_group(), limit, writing.Blocks.put

    def called(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event.startswith(("os.", "open", "shutil.")) and given and str(run) in str(given[0]):
            called()

    def counted(self: Any, *given: Any) -> None:
        called()
        put(self, *given)

    sys.addaudithook(hook)
    os.fsync = called  # which audits nothing; and a kill is no power cut
    writing.Blocks.put = counted
    sharded.save(run, 5, tensors, {}, group)
