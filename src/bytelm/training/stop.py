"""SIGINT, SIGTERM and SIGUSR1 as a request that long loops honour at safe points; a second one exits at once.

Slurm sends SIGUSR1 before the time limit with `sbatch --signal=USR1@60`. Under torchrun a second one changes nothing:
Slurm and systemd signal all processes of a job, and torchrun passes on what it hears, so that each hears it twice.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

SIGNALS: list[signal.Signals] = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


ELASTIC = "TORCHELASTIC_RUN_ID"  # a variable of every process that torchrun started


def exit_code(number: int) -> int:
    """The exit code after an orderly stop by a signal: 128 + its number, and 0 under torchrun.

    torchrun takes every other code for a failure: with `--max-restarts` it would start the processes again.
    """
    return 0 if ELASTIC in os.environ else 128 + number


class Interrupted(Exception):
    """A signal interrupted long work other than training's steps; what is done is kept. `signal` is its number."""

    def __init__(self, signal: int, kept: str = "") -> None:
        """`kept`: what is kept and where, for the user."""
        super().__init__(f"interrupted by signal {signal}{kept and ': '}{kept}")
        self.signal = signal


class StopRequest:
    """While entered, `received` is the stop signal, or None. Outside the main thread it receives none.

    Entering gives the request that is entered already, if one is: the parts of a training stop together.
    """

    _entered: ClassVar[StopRequest | None] = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        if StopRequest._entered is not None:
            return StopRequest._entered
        StopRequest._entered = self
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if StopRequest._entered is self:
            StopRequest._entered = None
            self._leave_the_rest()

    @classmethod
    def check(cls) -> None:
        """Raises Interrupted if a request is entered and a signal has asked to stop."""
        if cls._entered is not None and cls._entered.received is not None:
            raise Interrupted(cls._entered.received)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if ELASTIC not in os.environ:
            self._leave_the_rest()  # so that the next one is not waited for

    def _leave_the_rest(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
