"""How a model reads a file that is coded: in streams, by windows; and where the bytes of files lie.

    streams      the file in parts of one size, read in parallel: what `--streams` counts
    windows      a stream is reset after every half of the context, and reads the half before it
    a step       logits of every stream → a byte each, coded or decoded → read

Bytes that are known are read in chunks: all when compressing, and when decompressing those of the half before. They are
coded in the order of the steps all the same, so that a file does not depend on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.compress.sides import Side
from bytelm.data.files import PositionReader
from bytelm.decoding import open_decoder
from bytelm.errors import ResourceError, UsageError
from bytelm.interfaces.decoder import Decoder, Ints
from bytelm.interfaces.model import ByteModel
from bytelm.units import BOS, BYTES

Symbols = NDArray[np.uint8]
Progress = Callable[[int], None] | None
"""is told of so many bytes more"""
PIECE = 1 << 20  # bytes that are held of a whole file at a time


@runtime_checkable
class Readable(Protocol):
    """Bytes of a known number, read by position."""

    def read_into(self, start: int, out: Symbols) -> None:
        """Fill `out` with the bytes from `start`."""
        ...


@runtime_checkable
class Source(Readable, Protocol):
    """Bytes that are there, and stay as they are."""

    def check(self) -> None:
        """Raises DataError where they have changed."""
        ...


@runtime_checkable
class Target(Readable, Protocol):
    """Bytes that are written by position, too."""

    def write(self, start: int, data: Symbols) -> None:
        """Write bytes from `start` on."""
        ...

    def sync(self) -> None:
        """Make what was written last."""
        ...


class Held:
    """Bytes in memory."""

    def __init__(self, data: Symbols) -> None:
        self.data = data

    def read_into(self, start: int, out: Symbols) -> None:
        """See Readable."""
        out[:] = self.data[start : start + len(out)]

    def write(self, start: int, data: Symbols) -> None:
        """See Target."""
        self.data[start : start + len(data)] = data

    def check(self) -> None:
        """See Source."""

    def sync(self) -> None:
        """See Target."""


class Plain:
    """A file that is read."""

    def __init__(self, path: Path, size: int) -> None:
        """Open a file of so many bytes. Raises DataError."""
        self._file = PositionReader(path, size, way_out="give a file that stays as it is")

    def read_into(self, start: int, out: Symbols) -> None:
        """See Readable."""
        self._file.read_into(start, out)

    def check(self) -> None:
        """See Source."""
        self._file.check()


def pieces(source: Readable, size: int) -> Iterator[Symbols]:
    """All bytes of a source, some at a time."""
    for at in range(0, size, PIECE):
        piece = np.empty(min(PIECE, size - at), np.uint8)
        source.read_into(at, piece)
        yield piece


def checksum(source: Readable, size: int) -> int:
    """CRC-32 of all bytes of a source."""
    found = 0
    for piece in pieces(source, size):
        found = zlib.crc32(piece.data, found)
    return found


@dataclass(frozen=True)
class Streams:
    """Where the parts of a file of `size` bytes are that are read side by side."""

    size: int
    count: int

    @property
    def each(self) -> int:
        """Bytes of all but the last one, or ones."""
        return -(-self.size // self.count)

    @property
    def starts(self) -> Ints:
        """Where each begins."""
        return np.arange(self.count) * self.each

    @property
    def sizes(self) -> Ints:
        """Bytes of each."""
        return np.clip(self.size - self.starts, 0, self.each)

    def before(self, place: int) -> int:
        """Bytes of all streams before a place in them."""
        return int(np.minimum(self.sizes, place).sum())


@dataclass(frozen=True)
class Window:
    """Half a context of each stream, with the half before it."""

    block: Symbols  # [streams, bytes]: of each stream those from `first` on; zeros where it has ended
    first: int
    begin: int

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.first + self.block.shape[1]


def walk(
    model: ByteModel,
    source: Readable,
    streams: Streams,
    context: int,
    side: Side,
    since: int = 0,
    progress: Progress = None,
    *,
    known: bool,
) -> Iterator[Window]:
    """Give `side` the logits of every byte, a step's streams in turn, from place `since` on; a window at a time.

    Where the bytes are not `known` only those before `since` are read from the `source`. Raises UsageError for a token
    model or on another device than the CPU, ResourceError where there is no room for so many streams or such a context.
    """
    if model.tokens is not None:
        raise UsageError("this model reads tokens: compress with a model of bytes")
    if model.device.type != "cpu":  # where sums of one program differ from run to run, and what it writes is lost
        raise UsageError(
            f'the model is on {model.device}, which is not bitwise reproducible: load it with device="cpu"'
        )
    half = context // 2
    try:
        reader = open_decoder(model, rows=streams.count, capacity=1 + min(half + half, streams.each))
    except (MemoryError, OSError) as error:
        raise ResourceError(
            f"context {context}, {streams.count} streams: no room for what the model keeps of them: get a complete "
            "copy if the file is damaged, else compress with fewer streams"
        ) from error
    for begin in range(since, streams.each, half):
        first, end = max(0, begin - half), min(begin + half, streams.each)
        block = np.zeros((streams.count, end - first), np.uint8)
        for stream, (start, size) in enumerate(zip(streams.starts.tolist(), streams.sizes.tolist(), strict=True)):
            upto = min(size, end if known else begin)
            if upto > first:
                source.read_into(start + first, block[stream, : upto - first])
        window = Window(block, first, begin)
        # Where chunks have other logits, the bytes are read as they will be when they are decoded.
        read(reader, window, streams.sizes, side, progress, known=known and reader.repeats)
        yield window


def read(reader: Decoder, window: Window, sizes: Ints, side: Side, progress: Progress, *, known: bool) -> None:
    """Code the bytes of a window; those that `side` finds are written into it."""
    block, first, begin = window.block, window.first, window.begin
    rows = np.flatnonzero(sizes > begin)
    reader.rollback(rows, np.zeros(len(rows), np.int64))
    at = first  # of a stream, the byte whose logits come next
    while at < window.end:
        upto = min(at + reader.chunk, window.end if known else max(begin, at) + 1)
        rows = rows[sizes[rows] > at]
        columns = np.arange(at, upto) - first
        ids = block[rows[:, None], columns - 1].astype(np.int64)
        ids[:, columns == 0] = BOS
        steps = np.arange(max(at, begin), upto)
        wanted = np.tile(columns + first >= begin, len(rows))
        logits = reader.read(rows.repeat(upto - at), ids.ravel(), wanted)
        logits = logits.reshape(len(rows), len(steps), reader.vocabulary)[..., :BYTES].swapaxes(0, 1)
        there = sizes[rows] > steps[:, None]
        if there.any():
            step, row = np.nonzero(there)
            stream, column = rows[row], steps[step] - first
            block[stream, column] = side.code(logits[there], stream, block[stream, column])
            if progress:
                progress(len(stream))
        at = upto
