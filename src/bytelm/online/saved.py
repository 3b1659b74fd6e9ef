"""The memory of a run, saved in it: where it is, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from bytelm.errors import UsageError
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings

FILE = "memory.bin"  # in a run
Kind = Literal["cold", "primed"]


def home(run: Path) -> Path:
    """The run of a path, which may name one checkpoint of it."""
    return run.parent.parent if run.parent.name == "checkpoints" else run


def opened(run: Path, kind: Kind, size: int | None = None) -> Memory:
    """An empty memory of `size` bytes, or the one of the run. Raises UsageError and CheckpointError."""
    if kind == "cold":
        return Memory(Settings() if size is None else Settings(memory=size))
    path = home(run) / FILE
    if not path.exists():
        raise UsageError(f"online primed: {path} is missing: build it once with `bytelm prime {home(run)}`")
    return Memory.load(path)


def reader(run: Path) -> Callable[[], Memory] | None:
    """Opens the memory of the run each time anew; None where it has none."""
    path = home(run) / FILE
    return partial(Memory.load, path) if path.exists() else None
