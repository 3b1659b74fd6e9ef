"""Shards: one long sequence of bytes in files of bounded size, addressed by position."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from bytelm.data.blocks import BLOCK, SMALL, BlockReader, cache
from bytelm.data.files import PositionReader, sha256_of, sync_folder
from bytelm.data.places import Status, named, sha256_at
from bytelm.errors import DataError

_OPEN = 64  # shards held open at a time, so that a thousand of them do not use up what a process may open


@dataclass(frozen=True)
class Shard:
    """What is known of one shard file."""

    size: int
    sha256: str


def shard_path(directory: Path, number: int) -> Path:
    """The file of the shard with that number."""
    return directory / f"shard-{number:05d}.bin"


def shard_url(folder: str, number: int) -> str:
    """The URL of the shard with that number."""
    return f"{folder}/{shard_path(Path(), number)}"


class ShardWriter:
    """Appends bytes to a sequence, opening a new file every `shard_bytes` bytes."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        """Write shards into `directory`, from number 0 on."""
        self.total = 0
        self.shards: list[Shard] = []
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append `data`."""
        view = memoryview(data)
        while view:
            if self._size == 0:
                self._file = shard_path(self._directory, len(self.shards)).open("wb")
                self._digest = hashlib.sha256()
            part = view[: self._shard_bytes - self._size]
            self._file.write(part)
            self._digest.update(part)
            self._size += len(part)
            self.total += len(part)
            view = view[len(part) :]
            if self._size == self._shard_bytes:
                self.close()

    def close(self) -> None:
        """End the shard in hand and make it last. More may be written afterwards."""
        if self._size > 0:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            self.shards.append(Shard(self._size, self._digest.hexdigest()))
            self._size = 0
            sync_folder(self._directory)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._size > 0:
            self._file.close()


class Shards:
    """The sequence of bytes in the shards of a directory, with random access."""

    def __init__(self, directory: Path, shards: list[Shard], url: str | None = None, marks: Sequence[str] = ()) -> None:
        """Open the shards. Raises DataError naming one that is missing or of another size.

        With a `url` they lie in a folder there, had these `marks` when they were found, and are read in blocks.
        """
        self.total = sum(shard.size for shard in shards)
        self._directory = directory
        self._shards = shards
        self._ends = np.cumsum([shard.size for shard in shards])

        known = [Status(shard.size, mark) for shard, mark in zip(shards, marks, strict=bool(marks))]
        self._elsewhere = [(shard_url(url, number), status) for number, status in enumerate(known) if url]
        held = cache() if url else None

        def reader(number: int) -> PositionReader | BlockReader:
            if held:
                return BlockReader(*self._elsewhere[number], held, BLOCK if self.total <= held.limit else SMALL)
            return PositionReader(shard_path(directory, number), shards[number].size)

        self._reader = functools.lru_cache(_OPEN)(reader)
        for number in range(len(shards)):
            self._reader(number)

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """The bytes from `start`, as uint8 `[count]`. Raises DataError where a shard has become shorter."""
        if not 0 <= start <= start + count <= self.total:
            raise ValueError(f"bytes {start} to {start + count} were asked for of {self.total}")
        out = np.empty(count, np.uint8)
        number = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < count:
            end = int(self._ends[number])
            part = min(count - done, end - start - done)
            within = self._shards[number].size - (end - start - done)
            self._reader(number).read_into(within, out[done : done + part])
            done += part
            number += 1
        return out

    def verify(self) -> None:
        """Read everything and compare checksums. Raises DataError naming the first shard that differs."""
        for number, shard in enumerate(self._shards):
            path = shard_path(self._directory, number)
            if self._elsewhere:
                url, known = self._elsewhere[number]
                if sha256_at(url, known) != shard.sha256:
                    raise DataError(f"{named(url)} is not what was written (its SHA-256 differs): upload it again")
            elif sha256_of(path) != shard.sha256:
                raise DataError(f"{path} is not what was written (its SHA-256 differs): pack the data again")
