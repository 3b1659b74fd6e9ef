"""The processes that share a training: each takes its rows of every step, and its shard of the model.

    torchrun --nproc-per-node 2 -m -- bytelm train ~/notes      # the -- keeps our options from torchrun

torchrun forwards the signals that --signals-to-handle names, and dies of SIGUSR1 if it is not among them. Orphaned
processes save and exit at their next step.

All prepare the data together. The main process (rank 0) holds the run's lock, logs, and decides when to validate and
save, which all do together. A single process is a team of one, whose reductions are the identity.

Each has its own device (`bytelm.device`). Weights and gradients travel from there, by NCCL on GPUs (`parallelize`);
the few numbers that control flow depends on are reduced between hosts, over Gloo, without synchronizing a device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bytelm.errors import ConfigError, TrainingError
from bytelm.training.stop import StopRequest
from bytelm.transfer import HOST

T = TypeVar("T")
ON_ERROR = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
LISTEN = 1.0  # seconds between looks whether a collective has failed elsewhere
ROLL_CALL = 3.0  # seconds for the liveness check after a failed collective


class RollCall:
    """Who is there when a collective has failed: a thread of each process answers as soon as one has called.

    The process itself may still be waiting then: Gloo tells those who wait for the lost one, but not those who wait for
    them. All come to the same result, whenever they learn of the failure.
    """

    def __init__(self, store: Any, attempt: str, rank: int, world: int) -> None:
        """`store`: of all processes; rank 0 hosts it."""
        self._store, self._call, self._rank = store, f"{attempt}/call", rank
        self._here = [f"{attempt}/here/{other}" for other in range(world)]
        self._lost = [0]  # without the store nobody is known but who hosts it
        self._woken, self._ended = threading.Event(), threading.Event()
        self._listening = threading.Thread(target=self._listen, daemon=True, name="roll call")
        self._listening.start()

    def missing(self) -> list[int]:
        """Call all, and return the ranks of those that do not answer within seconds."""
        self._woken.set()
        self._listening.join(2 * ROLL_CALL)  # a store that hangs would block forever
        return self._lost

    def end(self) -> None:
        """Stop listening, before the store is gone."""
        self._ended.set()
        self._woken.set()
        self._listening.join(LISTEN)

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not (self._woken.wait(LISTEN) or self._store.check([self._call])):
                pass
            if self._ended.is_set():
                return
            for key in (self._call, self._here[self._rank]):
                self._store.set(key, "yes")
            end = time.monotonic() + ROLL_CALL
            while time.monotonic() < end:  # looked up again and again: rank 0 may end before, and the store with it
                time.sleep(ROLL_CALL / 10)
                self._lost = [rank for rank, key in enumerate(self._here) if not self._store.check([key])]


@dataclass(frozen=True)
class DistContext:
    """This process's rank in a data-parallel training."""

    rank: int = 0
    world: int = 1
    store: Any = None
    """The key-value store of all processes; None for a team of one."""
    launcher: int | None = None
    """The process id of the torchrun that started this process; None if started otherwise."""
    attempt: str = ""
    """What begins the keys of this attempt: torchrun's store, and all that is in it, outlives a restart."""
    roll_call: RollCall | None = None
    """Who is there when a collective has failed; None for a team of one."""
    saves: Any = None
    """A Gloo group for checkpoints that are written while the training goes on; None for a team of one."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the main process, which prepares, logs and saves."""
        return self.rank == 0

    def rows(self, batch: int) -> int:
        """The rows of a batch that are this process's. Raises ConfigError if they cannot be divided."""
        if batch % self.world:
            raise ConfigError(f"train.batch = {batch} cannot be shared by {self.world} processes: take a multiple")
        return batch // self.world

    def alone(self) -> DistContext:
        """The same process without collectives."""
        return DistContext(self.rank)

    def main_process_first(self, work: Callable[[], T], name: str = "prepared") -> T:
        """Run some work, the main process first: the others find its files on disk. `name`: used once."""
        if self.store is None:
            return work()
        key = f"{self.attempt}/{name}"
        if self.is_main_process:
            done = work()
            self.store.set(key, "yes")
            return done
        while True:
            StopRequest.check()
            with self.answering(), contextlib.suppress(dist.DistStoreError):  # of a wait that has run out
                self.store.wait([key], timedelta(seconds=1))
                break
        return work()

    def total(self, *values: float) -> list[float]:
        """The sums of values over all processes, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def agreed(self, heard: int | None, *due: bool) -> tuple[int | None, list[bool]]:
        """A signal that any of the processes received, and what is `due` by the clock of the main process.

        An orphaned process counts as terminated.
        """
        if heard is None and self.launcher is not None and os.getppid() != self.launcher:
            heard = signal.SIGTERM
        own = [float(each and self.is_main_process) for each in due]
        stop, *wanted = self._reduced([heard or 0, *own], dist.ReduceOp.MAX)
        return int(stop) or None, [bool(each) for each in wanted]

    def broadcast(self, value: T, source: int = 0) -> T:
        """What the process `source` gives, to all: plain JSON."""
        if self.world == 1:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        room = torch.zeros(int(self.total(len(data))[0]), dtype=torch.uint8)
        if data:
            room.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        with self.answering():
            dist.broadcast(room, source)
        return json.loads(room.numpy().tobytes())

    def longest(self, seconds: float) -> float:
        """The maximum over all processes."""
        return self._reduced([seconds], dist.ReduceOp.MAX)[0]

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place, where it is."""
        if self.world > 1:
            self._sum(tensor)

    def add_sparse(self, gradient: Tensor) -> Tensor:
        """The sum of a sparse gradient over all processes, coalesced: NCCL adds none, so that their rows travel."""
        if self.world == 1:
            return gradient
        gradient = gradient.coalesce()
        rows, values = (self.everyones(x) for x in (gradient._indices()[0], gradient._values()))
        return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False).coalesce()

    def everyones(self, mine: Tensor) -> Tensor:
        """All-gather the rows of a tensor, in order of rank."""
        if self.world == 1:
            return mine
        counts = [int(count) for count in self.total(*(len(mine) * (rank == self.rank) for rank in range(self.world)))]
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in counts]
        with self.answering():
            dist.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        self._sum(tensor, how)
        return tensor.tolist()

    def _sum(self, tensor: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """All-reduce a tensor in place. Raises TrainingError, which names unresponsive processes."""
        with self.answering():
            dist.all_reduce(tensor, how)

    @contextlib.contextmanager
    def answering(self) -> Generator[None]:
        """Raise TrainingError, which names unresponsive processes, if a collective fails, or the store is gone."""
        try:
            yield
        except GeneratorExit:  # looked for by no name that may be gone at exit
            raise
        except RuntimeError as error:
            if self.world == 1 or not of_others(error):
                raise
            raise TrainingError(
                f"{self._missing()} of {self.world} is unresponsive: run the same command again to resume from "
                "the latest checkpoint"
            ) from error

    def _missing(self) -> str:
        """The unresponsive ranks in words."""
        lost = self.roll_call.missing() if self.roll_call else []
        return f"process {', '.join(map(str, lost))}" if lost else "one"


SINGLE_PROCESS = DistContext()


def of_others(error: RuntimeError) -> bool:
    """Whether a collective failed, for want of another process: of Gloo's errors the words alone say so."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "ncclComm"))


def launched() -> tuple[int, int]:
    """The processes that share this training, and those of them on this machine, as torchrun says."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world, int(os.environ.get("LOCAL_WORLD_SIZE", world))


@contextlib.contextmanager
def init_distributed(timeout_minutes: float, device: torch.device = HOST) -> Generator[DistContext]:
    """The team of processes started by torchrun, or a team of one; `timeout_minutes`: of collectives.

    `device`: of this process; on GPUs one per process, its current device.
    """
    world, _ = launched()
    if world == 1:
        yield DistContext()
        return
    rank = int(os.environ.get("RANK", "0"))
    timeout = timedelta(minutes=timeout_minutes if math.isfinite(timeout_minutes) else 1e6)
    # By default NCCL kills a process that waits for a lost one; here it aborts the wait, and Gloo names the lost one.
    # torchrun sets 1, to kill, in every process that it starts, where nobody chose.
    if os.environ.get(ON_ERROR, "1") == "1":
        os.environ[ON_ERROR] = "2"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except RuntimeError as error:
        if not of_others(error):
            raise
        raise TrainingError(
            f"not all of {world} processes have met within {timeout_minutes:g} minutes ({str(error).splitlines()[0]}): "
            "start them again, with the same MASTER_ADDR and MASTER_PORT, or raise train.timeout_minutes"
        ) from error
    roll_call: RollCall | None = None
    try:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        found = DistContext(rank, world, dist.distributed_c10d._get_default_store(), launcher)
        saves = dist.new_group(timeout=timeout, backend="gloo")
        # Drawn by the main process: hosts count restarts apart from each other.
        attempt = found.broadcast(secrets.token_hex(4))
        roll_call = RollCall(found.store, attempt, rank, world)
        yield replace(found, attempt=attempt, roll_call=roll_call, saves=saves)
    finally:
        if roll_call is not None:
            roll_call.end()
        with contextlib.suppress(RuntimeError):  # peers may be gone
            dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this is the only process, or rank 0."""
    return os.environ.get("RANK", "0") == "0"
