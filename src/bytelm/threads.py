"""How many threads compute a step: all, or one where they hold each other up; chosen from measured throughput."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from bytelm.machine import spinning

TRIAL = 3  # steps after which an option is judged
FEW = 8  # steps until the first trial of fewer threads
REST, LONGEST = 64, 512  # steps until the others are tried again, twice as many each time that the same one wins
AT_WORK = 0.75  # of a step's time: a calling thread that computes, or spins, for more is not held up
NUMBER = "OMP_NUM_THREADS"
Option = TypeVar("Option")


@dataclass
class ThroughputTuner(Generic[Option]):
    """Chooses the option with the highest measured throughput; all are tried again periodically."""

    options: tuple[Option, ...]
    """The first one is the default."""
    trial: int = TRIAL
    ahead: float = 1.0
    """The required speed-up over the default."""
    rest: int = REST
    """Steps between two trials of all."""
    rates: dict[Option, float] = field(default_factory=dict[Option, float])
    steps: int = 0
    """Steps with the current option, their bytes and seconds."""
    bytes: int = 0
    seconds: float = 0.0
    queue: list[Option] = field(default_factory=list[Option])

    def __post_init__(self) -> None:
        self.best = self.options[0]

    @property
    def option(self) -> Option:
        """The one for the next step."""
        return self.queue[0] if self.queue else self.best

    def note(self, seconds: float, written: int) -> None:
        """Record the seconds and bytes of a step with this option."""
        self.steps, self.bytes, self.seconds = self.steps + 1, self.bytes + written, self.seconds + seconds
        if self.steps < (self.trial if self.queue else self.rest) or len(self.options) == 1:
            return
        if self.queue:
            self.rates[self.queue.pop(0)] = self.bytes / self.seconds
            if not self.queue:
                self.settle()
        else:
            self.rates[self.best] = self.bytes / self.seconds
            self.queue = self.trials()
        self.forget()

    def trials(self) -> list[Option]:
        """The options to be tried now: all others."""
        return [option for option in self.options if option != self.best]

    def forget(self) -> None:
        """Drop the steps noted since the last choice."""
        self.steps, self.bytes, self.seconds = 0, 0, 0.0

    def settle(self) -> None:
        """Switch to the fastest."""
        first = self.options[0]
        fastest = max(self.rates, key=lambda option: self.rates[option] * (self.ahead if option == first else 1))
        self.rest = min(2 * self.rest, LONGEST) if fastest == self.best else REST
        self.best = fastest


def all_or_one(most: int, rest: int = FEW) -> ThroughputTuner[int]:
    """All threads, or one, which is first tried after `rest` steps.

    Threads synchronize many times per byte. Beside another busy program, each wait for a descheduled thread
    takes milliseconds, and a single thread is fifty times as fast.
    """
    return ThroughputTuner((most, 1), trial=1, ahead=3.0, rest=rest)


class StepThreads:
    """Computes steps with all of torch's threads, or with one while others hold them up; puts the number back.

    Sums may round differently with another number of threads. So one is tried only after several steps in a row in
    which the calling thread mostly waited, as it does beside other busy programs, and is kept only where it is
    three times as fast. With OMP_NUM_THREADS set, or threads that do not spin, the number is never changed: such
    threads hold each other up little.
    """

    def __init__(self, adaptive: bool = True) -> None:
        """`adaptive`: whether the number may change at all; not where other processes or a GPU set the pace."""
        self.most = torch.get_num_threads()
        adaptive = adaptive and self.most > 1 and NUMBER not in os.environ and spinning()
        self.tuner = all_or_one(self.most, rest=TRIAL) if adaptive else None

    @contextlib.contextmanager
    def step(self, size: int = 1) -> Generator[None]:
        """Compute a step of so many rows with the threads chosen; one that raises is not counted, nor one of 0."""
        tuner, before = self.tuner, torch.get_num_threads()
        if tuner is None:
            yield
            return
        torch.set_num_threads(tuner.option)
        began, worked = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            torch.set_num_threads(before)
        seconds = time.perf_counter() - began
        if not size:
            return
        if tuner.option == self.most and not tuner.queue and time.thread_time() - worked > AT_WORK * seconds:
            tuner.forget()
        else:
            tuner.note(seconds, size)
