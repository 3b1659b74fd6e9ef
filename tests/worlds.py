"""Several processes at work in a test, started from one that has imported torch already, with torchrun's variables."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 120.0  # seconds that all of it may take
# Where tests are modules of a package, as pytest names them, the processes have to find it.
sys.path.append(str(Path(__file__).resolve().parents[1]))
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "bytelm.training.run"])


@contextmanager
def started(world: int, work: Callable[..., Any], *args: Any) -> Generator[list[tuple[BaseProcess, Connection]]]:
    """Processes that are at `work(*args)`, a function of a module, by rank; whoever is left at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(target=_begin, args=(there, rank, world, port, work, args), daemon=True)
            process.start()
            there.close()
            found.append((process, here))
        yield found
    finally:
        for process, here in found:
            process.kill()
            process.join()
            here.close()


def run(world: int, work: Callable[..., T], *args: Any) -> list[T]:
    """What `work(*args)` returns in each process, by rank. Raises AssertionError with the first one's traceback.

    In `work` the environment is torchrun's, so that `init_distributed` joins the others.
    """
    with started(world, work, *args) as processes:
        return results(processes)


def results(processes: list[tuple[BaseProcess, Connection]], patience: float = PATIENCE) -> list[Any]:
    """What each process returned. Raises AssertionError as `run` does, also for one that ended without a word."""
    waiting, found = {here: rank for rank, (_, here) in enumerate(processes)}, dict[int, Any]()
    while waiting:
        ready = wait(list(waiting), patience)
        assert ready, f"processes {sorted(waiting.values())} of {len(processes)} have not ended"
        for here in ready:
            assert isinstance(here, Connection)
            rank = waiting.pop(here)
            try:
                good, value = pickle.loads(here.recv_bytes())
            except EOFError:
                processes[rank][0].join()
                raise AssertionError(f"process {rank} ended with {processes[rank][0].exitcode}") from None
            assert good, f"process {rank}:\n{value}"
            found[rank] = value
    return [found[rank] for rank in range(len(processes))]


def _begin(
    there: Connection, rank: int, world: int, port: int, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    torch.set_num_threads(1)
    try:
        found: tuple[bool, Any] = True, work(*args)
    except BaseException:
        found = False, traceback.format_exc()
    there.send_bytes(pickle.dumps(found))  # `send` would share a tensor's memory, which ends with this process
