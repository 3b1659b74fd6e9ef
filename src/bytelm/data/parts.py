"""Parts of a corpus: some of the files each, packed into a folder by whoever takes the part, the same by anybody.

part-00007/shard-*.bin     the documents of its files, one after another
part-00007/documents.npy   their rows; which split they are in is decided when all parts are there
part-00007/orders.npy      a number for each row, drawn from its content and the seed
part-00007/whole.npy       documents before they are cut, in the order of their hashes, where duplicates are left out
part-00007/index.json      what is in it, written last
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.convert import read
from bytelm.data.corpus import ROW, TABLE, Index
from bytelm.data.files import sha256_of
from bytelm.data.formats import RECORDS, suffixes
from bytelm.data.modalities.base import Modality
from bytelm.data.options import DataConfig
from bytelm.data.report import SourceReport, StrictReport
from bytelm.data.shards import Shards, ShardWriter
from bytelm.data.sources import Document, find_files

SMALLEST_PIECE = 256
LARGEST_PIECE = 1 << 20
ORDERS, WHOLE = "orders.npy", "whole.npy"
# A document before it is cut: its hash in two halves, its first row in the part, and how many rows it has.
WHOLE_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("first", "<i8"), ("rows", "<i8")])


@dataclass(frozen=True)
class Plan:
    """The files of each part, in order; `sizes` are theirs on disk, `report` what was skipped when they were listed."""

    parts: list[list[str]]
    sizes: list[int]
    needed: int
    """Bytes that are known to be written: files of many documents, and those of unknown size, count as nothing."""
    report: SourceReport


def planned(paths: Sequence[str | Path], exclude: Sequence[str | Path], strict: bool, part_bytes: int) -> Plan:
    """Divide the files of `paths` into parts of at most `part_bytes` each, or one file: by order and size alone.

    Where one part has everything it is of the paths as they are given, and nothing is in the report yet. Raises
    DataError for a path that is not there, and for a file to be skipped if that is `strict`ly forbidden.
    """
    report = StrictReport() if strict else SourceReport()
    parts: list[list[str]] = [[]]
    sizes, needed = [0], 0
    for file in find_files(paths, exclude, report):
        size = file.stat.st_size if file.stat else 0
        if parts[-1] and sizes[-1] + size > part_bytes:
            parts.append([])
            sizes.append(0)
        parts[-1].append(file.path)
        sizes[-1] += size
        needed += 0 if suffixes(file.name)[0] in RECORDS else size
    if len(parts) == 1:
        return Plan([[str(path) for path in paths]], sizes, needed, SourceReport())
    return Plan(parts, sizes, needed, report)


@dataclass(frozen=True)
class Packing:
    """How the files of a part are packed; `cut_at` is the size of the pieces, None where it depends on the total."""

    options: DataConfig
    modality: Modality | None
    exclude: Sequence[str | Path]
    shard_bytes: int
    cut_at: int | None

    def part(self, files: Sequence[str], folder: Path, progress: Callable[[int], None]) -> None:
        """Pack some files into a folder, which is made; `progress` is called with its bytes so far."""
        options = self.options
        folder.mkdir()
        report = StrictReport() if options.strict else SourceReport()
        # How many of a source's images are damaged is only known when all parts are there.
        whole = self.modality is None or self.cut_at is None
        limits = (options.max_bad if whole else 1.0, options.max_window)
        with ShardWriter(folder, self.shard_bytes) as writer:
            documents = read(files, self.modality, options.text_field, report, self.exclude, *limits)
            taken = _take(documents, writer, progress)
        shards = Shards(folder, writer.shards)
        rows, pieces = self._rows(shards, taken)
        save(folder / TABLE, rows)
        save(folder / ORDERS, _orders(rows, options.seed))
        if options.deduplicate:
            save(folder / WHOLE, _whole(rows["hash"], pieces))
        digest, grain = sha256_of(folder / TABLE), self.modality.grain if self.modality else 1
        Index(writer.total, writer.shards, digest, list(taken.suffixes), report, None, grain).write(folder)

    def _rows(self, shards: Shards, taken: _Taken) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The rows of all documents after the cut, and how many each document has."""
        piece = self.cut_at or min(max(shards.total // 16, SMALLEST_PIECE), LARGEST_PIECE)
        sizes, kinds, pieces = array("q"), array("q"), array("q")
        starts = itertools.accumulate(taken.sizes, initial=0)
        for start, size, kind in zip(starts, taken.sizes, taken.kinds, strict=False):
            grain = self.modality.grain if self.modality else None
            parts = _cut_at_lines(shards, start, size, piece) if grain is None else _cut(size, piece, grain)
            sizes.extend(parts)
            kinds.extend(kind for _ in parts)
            pieces.append(len(parts))
        rows = np.zeros(len(sizes), ROW)
        rows["size"] = sizes
        rows["suffix"] = kinds
        rows["hash"] = _hashes(shards, sizes)
        return rows, np.array(pieces, np.int64)


@dataclass(frozen=True)
class _Taken:
    """Documents as they came, before any is cut: their sizes, and their kinds as numbers of `suffixes`."""

    sizes: array[int]
    kinds: array[int]
    suffixes: dict[str, int]


def _take(documents: Iterable[Document], writer: ShardWriter, progress: Callable[[int], None]) -> _Taken:
    """Copy all documents into the shards."""
    taken = _Taken(array("q"), array("q"), {})
    for document in documents:
        before = writer.total
        for piece in document.pieces:
            writer.write(piece)
            progress(writer.total)
        taken.sizes.append(writer.total - before)
        taken.kinds.append(taken.suffixes.setdefault(document.suffix, len(taken.suffixes)))
    return taken


def _cut(size: int, piece: int, grain: int) -> list[int]:
    """The sizes that a document of a modality is cut into, multiples of `grain`: of `piece` bytes if that is enough."""
    piece = max(piece // grain, 1) * grain
    return [min(piece, size - start) for start in range(0, size, piece)]


def _cut_at_lines(shards: Shards, start: int, size: int, piece: int) -> list[int]:
    """The sizes that a document is cut into, none above `piece`: after the last newline of the last quarter, if any.

    So every split gets something of one large file, and no document is too long to be held.
    """
    sizes: list[int] = []
    while size > piece:
        quarter = shards.read(start + piece - piece // 4, piece // 4)
        newlines = np.flatnonzero(quarter == ord("\n"))
        part = piece - piece // 4 + int(newlines[-1]) + 1 if len(newlines) else piece
        sizes.append(part)
        start += part
        size -= part
    return [*sizes, size]


def _hashes(shards: Shards, sizes: array[int]) -> NDArray[np.uint8]:
    """The hash of each row's content, `[rows, 16]`."""
    hashes = bytearray()
    for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        hashes += blake2b(shards.read(start, size).data, digest_size=16).digest()
    return np.frombuffer(hashes, np.uint8).reshape(-1, 16)


def _orders(rows: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """A number for each row, drawn from its hash and the seed."""
    key, orders = str(seed).encode(), bytearray()
    for content in rows["hash"]:
        orders += blake2b(content.tobytes(), digest_size=8, key=key).digest()
    return np.frombuffer(orders, np.uint64)


def _whole(hashes: NDArray[np.uint8], pieces: NDArray[np.int64]) -> NDArray[Any]:
    """The documents before the cut, in the order of their hashes: of one row its own, of more that of their hashes."""
    found = np.zeros(len(pieces), WHOLE_ROW)
    found["first"], found["rows"] = np.cumsum(pieces) - pieces, pieces
    for number, (first, count) in enumerate(zip(found["first"].tolist(), pieces.tolist(), strict=True)):
        own = hashes[first : first + count].tobytes()
        own = own if count == 1 else blake2b(own, digest_size=16).digest()
        found["high"][number], found["low"][number] = int.from_bytes(own[:8], "big"), int.from_bytes(own[8:], "big")
    return found[np.lexsort((found["first"], found["low"], found["high"]))]


def save(path: Path, values: NDArray[Any]) -> None:
    """Write an array that lasts, into a folder that nobody else writes into."""
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
