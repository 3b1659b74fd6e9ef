"""The interface of the stages before the first training step, and how they are run."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import Corpus
from bytelm.data.selection import sample_evenly
from bytelm.training.journal import Journal
from bytelm.training.stop import StopRequest
from bytelm.units import show_bytes

T = TypeVar("T")

Count = Callable[[int], None]
"""Called with the bytes done so far. Raises Interrupted after a signal."""


class Stage(abc.ABC, Generic[T]):
    """A result made once and kept on disk, from the constructor's arguments only, the same if interrupted."""

    name: str
    """The phase, for progress and journal."""
    path: Path
    """Where the result is stored."""
    total: int | None = None
    """The bytes to process, if known."""

    def done(self) -> bool:
        """Whether the result exists. Raises DataError if it was made from other inputs."""
        return self.path.exists()

    @abc.abstractmethod
    def load(self) -> T:
        """Load the result."""

    @abc.abstractmethod
    def make(self, count: Count) -> T:
        """Make and store the result. `count` is called often enough to react to signals."""

    def fingerprint(self) -> str | None:
        """A hash of the inputs, stored with the result and compared; None if `run.keep_config` ensures equal inputs."""
        return None

    def summary(self, result: T) -> list[str]:
        """Log lines about a new result."""
        return []


def run_stage(stage: Stage[T], journal: Journal) -> T:
    """The result of a stage, loaded if done, else made. Raises Interrupted."""
    first = True

    def count(bytes: int) -> None:
        nonlocal first
        StopRequest.check()
        of = "" if stage.total is None else f" of {show_bytes(stage.total)}"
        journal.progress(f"{stage.name}: {show_bytes(bytes)}{of}", force=first)
        first = False

    with journal.phase(stage.name):
        if stage.done():
            return stage.load()
        StopRequest.check()
        result = stage.make(count)
    for line in stage.summary(result):
        journal.say(line)
    return result


def sampled(corpus: Corpus, limit: int, count: Count) -> list[NDArray[np.uint8]]:
    """Training documents, evenly sampled, about `limit` bytes in total."""
    found = [document for _, document in sample_evenly(corpus, "train", limit)]
    for bytes in itertools.accumulate(map(len, found)):
        count(bytes)
    return found
