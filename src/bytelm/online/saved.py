"""The memory of a run: an empty one for bytes like its own, or the one that is saved in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpora import open_corpus
from bytelm.data.corpus import Corpus
from bytelm.errors import BytelmError, UsageError
from bytelm.online.kinds import SAMPLE, suited
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings

FILE = "memory.bin"  # in a run
PIECE = 1 << 18  # bytes that are read of the training split at once, at most
Kind = Literal["cold", "primed"]


def home(run: Path) -> Path:
    """The run of a path, which may name one checkpoint of it."""
    return run.parent.parent if run.parent.name == "checkpoints" else run


def unread(corpus: Corpus, done: int) -> Iterator[NDArray[np.uint8]]:
    """The documents of the training split, in pieces and in order, without their first `done` bytes."""
    for table in corpus.tables("train"):
        for start, size in zip(table.starts.tolist(), table.sizes.tolist(), strict=True):
            skipped = min(done, size)
            done -= skipped
            for at in range(start + skipped, start + size, PIECE):
                yield corpus.read(at, min(PIECE, start + size - at))


def for_training(corpus: Corpus, settings: Settings) -> Settings:
    """With predictors that suit the training split, by its beginning."""
    left, found = SAMPLE, [np.zeros(0, np.uint8)]
    for piece in unread(corpus, 0):
        found.append(piece[:left])
        left -= len(found[-1])
        if not left:
            break
    return suited(np.concatenate(found), settings)


def empty(run: Path, settings: Settings) -> Memory:
    """An empty memory with predictors that suit the run's training split, where that is still there."""
    with suppress(BytelmError):  # gone, or damaged: what it holds is not needed
        settings = for_training(open_corpus(home(run) / "data"), settings)
    return Memory(settings)


def opened(run: Path, kind: Kind, settings: Settings | None = None) -> Memory:
    """An `empty` memory, or the one of the run. Raises UsageError and CheckpointError."""
    if kind == "cold":
        return empty(run, settings or Settings())
    path = home(run) / FILE
    if not path.exists():
        raise UsageError(f"online primed: {path} is missing: build it once with `bytelm prime {home(run)}`")
    return Memory.load(path)


def reader(run: Path) -> Callable[[], Memory] | None:
    """Opens the memory of the run each time anew; None where it has none."""
    path = home(run) / FILE
    return partial(Memory.load, path) if path.exists() else None
