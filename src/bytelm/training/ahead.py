"""Prefetch: a thread prepares the next step while this one runs, so that the device does not wait for the host."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """Prepares the inputs of step t + 1 once those of step t are taken.

    `make` is a pure function of the step, so that one that is not taken next costs time and nothing else. Used as a
    context, no thread is left where it ends.
    """

    def __init__(self, make: Callable[[int], T], device: torch.device) -> None:
        """`device` is where the thread copies to, if it does."""
        self._make, self._device = make, device
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """What a step needs. Raises what making it raised."""
        made, self._next = self._next, None
        found = made[1].result() if made is not None and made[0] == step else self._make(step)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "ahead", self._begin)
        self._next = step + 1, self._thread.submit(self._make, step + 1)
        return found

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = self._next = None

    def _begin(self) -> None:
        if self._device.type == "cuda":  # the current GPU is per thread, by default the first
            torch.cuda.set_device(self._device)
