"""Files of a checkpoint, written through to the disk while a thread computes their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.checkpoint.tensors import Piece

SYNC = 256 << 20  # bytes after which the disk is set to work; else it waits until the system holds gigabytes


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file."""

    size: int
    sha256: str
    tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    """The sha256 of the bytes of each tensor, by its name in the file; empty in older checkpoints."""

    @classmethod
    def of(cls, table: Any) -> Entry:
        """What `table` returned. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        tensors = table.get("tensors", {})
        return cls(
            int(table["size"]), str(table["sha256"]), {str(name): str(digest) for name, digest in tensors.items()}
        )

    def table(self) -> dict[str, Any]:
        """As JSON."""
        tensors = {"tensors": dict(self.tensors)} if self.tensors else {}
        return {"size": self.size, "sha256": self.sha256, **tensors}


def write(path: Path, pieces: Iterable[Piece]) -> Entry:
    """Write a new file through to the disk; checksums are of what was meant, not of what was read back.

    A piece is hashed while it is written and the next one is read or computed; the disk writes meanwhile.
    """
    whole, tensors = hashlib.sha256(), dict[str, Any]()

    def add(name: str, data: bytes | memoryview) -> None:
        whole.update(data)
        if name:
            tensors.setdefault(name, hashlib.sha256()).update(data)

    with path.open("xb") as file, ThreadPoolExecutor(2) as beside:
        hashed, synced, waiting = done(), done(), 0
        for name, data in pieces:
            hashed.result()  # so that no more than two pieces are held
            hashed = beside.submit(add, name, data)
            waiting += file.write(data)
            if waiting >= SYNC and synced.done():
                synced.result()
                file.flush()
                synced, waiting = beside.submit(os.fsync, file.fileno()), 0
        synced.result()
        file.flush()
        os.fsync(file.fileno())
        hashed.result()
        found = {name: digest.hexdigest() for name, digest in tensors.items()}
        return Entry(file.tell(), whole.hexdigest(), found)


def done() -> Future[None]:
    """What there is nothing to wait for."""
    found = Future[None]()
    found.set_result(None)
    return found
