"""The one interface of what comes before the first step of a training, and the one way in which it is run."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import Corpus
from bytelm.data.selection import spread
from bytelm.training.journal import Journal
from bytelm.training.stop import StopRequest
from bytelm.units import show_bytes

T = TypeVar("T")

Count = Callable[[int], None]
"""Is given the bytes done so far. Raises Interrupted where a signal has asked to stop."""


class Stage(abc.ABC, Generic[T]):
    """One result that is made once and kept on disk. The constructor takes just the values that it depends on.

    A stage that was interrupted resumes, or begins anew, when it is run again: the result is the same.
    """

    name: str
    """What it does, as progress and the journal have it."""
    path: Path
    """Where the result is."""
    total: int | None = None
    """The bytes that there are to do, where that is known."""

    def done(self) -> bool:
        """Whether the result is there. Raises DataError where what is there was made of other inputs."""
        return self.path.exists()

    @abc.abstractmethod
    def load(self) -> T:
        """The result that is there."""

    @abc.abstractmethod
    def make(self, count: Count) -> T:
        """Make the result and keep it. `count` is called often enough for a signal to be heard."""

    def fingerprint(self) -> str | None:
        """What the result depends on, where that is kept beside it and compared.

        None where `run.keep_config` answers for it, which lets no other configuration into a run.
        """
        return None

    def summary(self, result: T) -> list[str]:
        """Lines about a result that was just made."""
        return []


def run_stage(stage: Stage[T], journal: Journal) -> T:
    """The result of a stage, loaded where it is done, and made where it is not. Raises Interrupted."""
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
    """Training documents, evenly over all of them, that come to about `limit` bytes."""
    found = [document for _, document in spread(corpus, "train", limit)]
    for bytes in itertools.accumulate(map(len, found)):
        count(bytes)
    return found
