"""Data parallelism: each process takes its rows of every step, and gradients are all-reduced.

    torchrun --nproc-per-node 2 -m -- bytelm train ~/notes      # the -- keeps our options from torchrun

torchrun forwards the signals that --signals-to-handle names, and dies of SIGUSR1 if it is not among them. Orphaned
processes save and exit at their next step.

All prepare the data together. The main process (rank 0) holds the run's lock, logs, validates and saves. The others
read what it wrote, and take steps. A single process is a team of one, whose reductions are the identity.

Each has its own device (`bytelm.device`). Gradients are reduced there, by NCCL on GPUs; the few numbers that control
flow depends on are reduced between hosts, over Gloo, without synchronizing a device.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bytelm.errors import ConfigError, TrainingError
from bytelm.training.stop import StopRequest
from bytelm.transfer import HOST

T = TypeVar("T")
PREPARED = "prepared"  # a key of the store that all processes share
ROLL_CALL = 3.0  # seconds for the liveness check after a failed collective


@dataclass(frozen=True)
class DistContext:
    """This process's rank in a data-parallel training."""

    rank: int = 0
    world: int = 1
    store: Any = None
    """The key-value store of all processes; None for a team of one."""
    launcher: int | None = None
    """The process id of the torchrun that started this process; None if started otherwise."""

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

    def main_process_first(self, work: Callable[[], T], name: str = PREPARED) -> T:
        """Run some work, the main process first: the others find its files on disk. `name`: a key, used once."""
        if self.store is None:
            return work()
        if self.is_main_process:
            done = work()
            self.store.set(name, "yes")
            return done
        while True:
            StopRequest.check()
            with contextlib.suppress(dist.DistStoreError):
                self.store.wait([name], timedelta(seconds=1))
                return work()

    def total(self, *values: float) -> list[float]:
        """The sums of values over all processes, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def agreed(self, heard: int | None) -> int | None:
        """A signal that any of the processes received; an orphaned process counts as terminated."""
        if heard is None and self.launcher is not None and os.getppid() != self.launcher:
            heard = signal.SIGTERM
        return int(self._reduced([heard or 0], dist.ReduceOp.MAX)[0]) or None

    def longest(self, seconds: float) -> float:
        """The maximum over all processes."""
        return self._reduced([seconds], dist.ReduceOp.MAX)[0]

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """All-reduce every gradient."""
        if self.world == 1:
            return
        dense: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad.is_sparse:
                gradient = parameter.grad.coalesce()  # NCCL has no sparse all-reduce: their rows are gathered
                rows, gradients = (self.everyones(x) for x in (gradient._indices()[0], gradient._values()))
                found = torch.sparse_coo_tensor(rows[None], gradients, gradient.shape, check_invariants=False)
                parameter.grad = found.coalesce()
            else:
                dense.append(parameter.grad)
        flat = torch.cat([gradient.reshape(-1) for gradient in dense])
        self._sum(flat)
        for gradient, summed in zip(dense, flat.split([g.numel() for g in dense]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def everyones(self, mine: Tensor) -> Tensor:
        """All-gather the rows of a tensor, in order of rank."""
        if self.world == 1:
            return mine
        counts = [int(count) for count in self.total(*(len(mine) * (rank == self.rank) for rank in range(self.world)))]
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in counts]
        with self._answering():
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
        with self._answering():
            dist.all_reduce(tensor, how)

    @contextlib.contextmanager
    def _answering(self) -> Generator[None]:
        """Raise TrainingError, which names unresponsive processes, if a collective fails."""
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"{self._missing()} of {self.world} is unresponsive: run the same command again to resume from "
                "the latest checkpoint"
            ) from error

    def _missing(self) -> str:
        """The unresponsive ranks; rank 0 hosts the store, without which they are unknown."""
        lost = [0]

        def call() -> None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"here/{self.rank}", "yes")
                time.sleep(ROLL_CALL)
                lost[:] = [rank for rank in range(self.world) if not self.store.check([f"here/{rank}"])]

        calling = threading.Thread(target=call, daemon=True)  # a store that hangs would block forever
        calling.start()
        calling.join(2 * ROLL_CALL)
        return f"process {', '.join(map(str, lost))}" if lost else "one"


SINGLE_PROCESS = DistContext()


@contextlib.contextmanager
def init_distributed(timeout_minutes: float, device: torch.device = HOST) -> Generator[DistContext]:
    """The team of processes started by torchrun, or a team of one; `timeout_minutes`: of collectives.

    `device`: of this process; on GPUs one per process, its current device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield DistContext()
        return
    rank = int(os.environ.get("RANK", "0"))
    timeout = timedelta(minutes=timeout_minutes if math.isfinite(timeout_minutes) else 1e6)
    # By default NCCL kills a process that waits for a lost one; here it aborts the wait, and Gloo names the lost one.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        yield DistContext(rank, world, dist.distributed_c10d._get_default_store(), launcher)
    finally:
        with contextlib.suppress(RuntimeError):  # peers may be gone
            dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this is the only process, or rank 0."""
    return os.environ.get("RANK", "0") == "0"
