"""torchrun in a test: its workers by rank, what they say, and nobody left at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bytelm.checkpoint import store
from bytelm.checkpoint.metrics import METRICS, read_metrics

PATIENCE = 180.0  # seconds that anything may take
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # else a restart reads addresses of the attempt before it
ALL = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass(frozen=True)
class Launcher:
    """A torchrun at work, whose log is a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def workers(self) -> dict[int, int]:
        """Process ids by rank; empty while there are none."""
        return ranks(descendants(self.process.pid))

    @property
    def said(self) -> str:
        """All that torchrun and its workers have written."""
        return self.log.read_text(errors="replace")

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for something, or raise AssertionError with the log when it does not come, or torchrun ends before."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert self.process.poll() is None or what(), f"torchrun ended with {self.process.returncode}:\n{self.said}"
            assert time.monotonic() < deadline, f"it did not come:\n{self.said}"
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for the end. Returns torchrun's exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun does not end:\n{self.said}") from None


@contextmanager
def torchrun(log: Path, options: Sequence[str], words: Sequence[str], *before: str) -> Generator[Launcher]:
    """`bytelm` with `words` under torchrun; `before`: a command that starts it. All of it is killed at the end."""
    command = [*before, sys.executable, "-m", "torch.distributed.run", *options, "-m", "--", "bytelm", *words]
    quick = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3", OWN_STORE: "1"}  # seconds until a worker that hangs is killed
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **quick})
    try:
        yield Launcher(process, log)
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            kill(pid)
        process.wait()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(below for child in own for below in descendants(child))]


def ranks(pids: Sequence[int]) -> dict[int, int]:
    """The workers among some processes, by rank."""
    found: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found.update((int(each[5:]), pid) for each in variables if each.startswith(b"RANK="))
    return found


def step_of(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return int(store.newest(run).name.split("-")[1]) if store.checkpoints(run) else 0


def sessions(run: Path) -> int:
    """How often a run was started."""
    lines = read_metrics(run / METRICS) if (run / METRICS).exists() else []
    return sum(line["kind"] == "session_start" for line in lines)
