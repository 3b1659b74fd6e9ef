"""Files of a checkpoint, written through to the disk while threads compute their checksums.

Whole blocks go to the disk itself (O_DIRECT) where the system can: through the page cache, which they would push other
files out of, the processor is the limit and not the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.checkpoint.tensors import Piece

BLOCK = 4 << 20  # bytes that are written together, a multiple of any disk's own blocks


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

    A piece is hashed while it is written and the next one is read or computed.
    """
    whole, tensors = hashlib.sha256(), dict[str, Any]()

    def add(name: str, data: bytes | memoryview) -> None:
        if name:
            tensors.setdefault(name, hashlib.sha256()).update(data)

    with Blocks(path) as file, ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        hashed = [done(), done()]
        for name, data in pieces:
            for each in hashed:
                each.result()  # so that no more than two pieces are held
            hashed = [first.submit(whole.update, data), second.submit(add, name, data)]
            file.write(data)
        size = file.end()
        for each in hashed:
            each.result()
    return Entry(size, whole.hexdigest(), {name: digest.hexdigest() for name, digest in tensors.items()})


class Blocks:
    """A new file that is written in order, block by block, while the next block is filled."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, also if there is a file."""
        self.file = path.open("xb", buffering=0)
        self.direct = -1
        with contextlib.suppress(OSError, AttributeError):  # not on this file system, not on this system
            self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        self.blocks = [mmap.mmap(-1, BLOCK) for _ in range(2)]  # at the beginning of a page, as O_DIRECT needs
        self.filled = self.size = 0
        self.beside = ThreadPoolExecutor(1)
        self.written = done()

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.beside.shutdown()
        self.file.close()
        if self.direct >= 0:
            os.close(self.direct)

    def write(self, data: bytes | memoryview) -> None:
        """Append some bytes. Raises OSError for this or an earlier block."""
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            count = min(BLOCK - self.filled, len(view) - done)
            self.blocks[0][self.filled : self.filled + count] = view[done : done + count]
            self.filled += count
            done += count
            if self.filled == BLOCK:
                self.flush()

    def flush(self) -> None:
        """Have the block that was filled written."""
        self.written.result()
        self.written = self.beside.submit(self.put, self.blocks[0], self.size, self.filled)
        self.size, self.filled = self.size + self.filled, 0
        self.blocks.reverse()

    def put(self, block: mmap.mmap, start: int, count: int) -> None:
        """Write a block at its place: past the page cache if it is a whole one."""
        with memoryview(block) as view:
            if self.direct >= 0 and count == BLOCK:
                try:
                    if os.pwrite(self.direct, view, start) == BLOCK:
                        return
                except OSError:  # where O_DIRECT is refused only now; a disk that is full says so again below
                    pass
            done = 0
            self.file.seek(start)
            while done < count:
                done += self.file.write(view[done:count])

    def end(self) -> int:
        """Write the rest, and wait for the disk. Returns the size of the file."""
        self.flush()
        self.written.result()
        os.fsync(self.file.fileno())
        return self.size


def done() -> Future[Any]:
    """What there is nothing to wait for."""
    found = Future[Any]()
    found.set_result(None)
    return found
