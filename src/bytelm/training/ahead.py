"""Prefetch: threads prepare the next steps while this one runs, so that nobody waits for the host, or for a store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """Prepares the inputs of the next steps once those of step t are taken.

    `make` is a pure function of the step, so that one that is not taken next costs time and nothing else. Used as a
    context, no thread is left where it ends.
    """

    def __init__(self, make: Callable[[int], T], device: torch.device, steps: int = 1) -> None:
        """`device` is where the threads copy to, if they do; `steps` are made at the same time, each by a thread."""
        self._make, self._device, self._steps = make, device, steps
        self._threads: ThreadPoolExecutor | None = None
        self._next: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        """What a step needs. Raises what making it raised."""
        made = self._next.pop(step, None)
        found = made.result() if made is not None else self._make(step)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._steps, "ahead", self._begin)
        wanted = range(step + 1, step + 1 + self._steps)
        for other in self._next.keys() - set(wanted):
            self._next.pop(other).cancel()
        for later in wanted:
            if later not in self._next:
                self._next[later] = self._threads.submit(self._make, later)
        return found

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._threads, self._next = None, {}

    def _begin(self) -> None:
        if self._device.type == "cuda":  # the current GPU is per thread, by default the first
            torch.cuda.set_device(self._device)
