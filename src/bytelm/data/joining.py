"""Parts become one corpus: which documents are duplicates, which split each is in, one table, shards in a row.

All of it reads the tables of the parts, not their bytes, and holds a bounded number of documents at a time.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import DUPLICATE, ROW, SPLITS, TABLE, Index
from bytelm.data.files import sync_folder
from bytelm.data.options import DataConfig
from bytelm.data.parts import ORDERS, WHOLE
from bytelm.data.report import SourceReport
from bytelm.data.shards import Shard, shard_path

EXACT = 1 << 21  # rows up to which contents are assigned to splits one by one; above, in 2^20 groups of their numbers
GROUPS = 20  # bits
HELD = 1 << 21  # documents that are compared with each other at a time
_U64 = 1 << 64


@dataclass(frozen=True)
class Joined:
    """A corpus but for its index: what that says of bytes and documents, and the reports of all parts together."""

    bytes: int
    shards: list[Shard]
    documents: str
    suffixes: list[str]
    report: SourceReport


class Parts:
    """Finished parts in order."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.indices = [Index.load(folder) for folder in folders]

    def rows(self, number: int) -> NDArray[Any]:
        """The rows of a part."""
        return np.load(self.folders[number] / TABLE, allow_pickle=False)

    def orders(self, number: int) -> NDArray[np.uint64]:
        """A number for each row of a part, the same for equal contents."""
        return np.load(self.folders[number] / ORDERS, allow_pickle=False)

    def report(self, listed: SourceReport) -> SourceReport:
        """What was skipped when the files were listed, and in all parts."""
        for index in self.indices:
            listed.add(index.source)
        return listed


def join(parts: Parts, directory: Path, options: DataConfig, report: SourceReport, own: str) -> Joined:
    """Write the table of all parts into `directory`, and move their shards there, in order.

    It may be interrupted at any instant and done again, or by two at once: what one has moved the other finds. `own` is
    a suffix for files in the making, which no other process uses.
    """
    count = [len(parts.rows(number)) for number in range(len(parts.folders))]
    dropped = [np.zeros(rows, bool) for rows in count]
    if options.deduplicate:
        report.duplicates = _mark_duplicates(parts, dropped)
    splits = _Splits(parts, dropped, options.valid, options.test)
    names: dict[str, int] = {}
    # In the folder that is removed when all is done: what a killed process leaves there goes with it.
    aside, digest = parts.folders[0].parent / f"{TABLE}.{own}.tmp", sha256()
    with aside.open("wb") as file:
        for piece in _table(parts, splits, dropped, names, sum(count)):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(directory / TABLE)
    shards = _moved(parts, directory)
    return Joined(sum(i.bytes for i in parts.indices), shards, digest.hexdigest(), list(names), report)


def _table(parts: Parts, splits: _Splits, dropped: list[NDArray[np.bool_]], names: dict[str, int], count: int) -> Any:
    """The bytes of the table, part by part; `names` is filled with the kinds of files."""
    header = np.lib.format.header_data_from_array_1_0(np.zeros(0, ROW)) | {"shape": (count,)}

    class Bytes(bytearray):
        write = bytearray.extend

    held = Bytes()
    np.lib.format.write_array_header_1_0(held, header)  # pyright: ignore[reportArgumentType]
    yield bytes(held)
    for number, index in enumerate(parts.indices):
        rows = parts.rows(number)
        numbers = [names.setdefault(name, len(names)) for name in index.suffixes]
        rows["suffix"] = np.array([*numbers, 0], np.int32)[rows["suffix"]]
        rows["split"] = np.where(dropped[number], DUPLICATE, splits.of(parts.orders(number)))
        yield rows.tobytes()


def _moved(parts: Parts, directory: Path) -> list[Shard]:
    """Rename the shards of all parts to their numbers in the corpus, and remove others that are left from before."""
    shards = [shard for index in parts.indices for shard in index.shards]
    number = 0
    for folder, index in zip(parts.folders, parts.indices, strict=True):
        for own in range(len(index.shards)):
            target = shard_path(directory, number)
            try:
                shard_path(folder, own).rename(target)
            except FileNotFoundError:  # moved already, by us before an interruption or by another process
                if target.stat().st_size != shards[number].size:
                    raise
            number += 1
    while (left := shard_path(directory, number)).exists():
        left.unlink(missing_ok=True)
        number += 1
    sync_folder(directory)
    return shards


# --- duplicates -------------------------------------------------------------------------------------------------------


def _mark_duplicates(parts: Parts, dropped: list[NDArray[np.bool_]]) -> int:
    """Mark the rows of documents that occur before, in an earlier part or earlier in theirs; how many documents."""
    tables: list[Any] = [np.load(folder / WHOLE, mmap_mode="r", allow_pickle=False) for folder in parts.folders]
    turns = -(-sum(map(len, tables)) // HELD)
    edges = [turn * _U64 // max(1, turns) for turn in range(turns + 1)]
    firsts = [0] * len(tables)
    found = 0
    for end in edges[1:]:
        lasts = [
            len(t) if end == _U64 else bisect_left(t["high"], end, lo) for t, lo in zip(tables, firsts, strict=True)
        ]
        held = [np.array(table[a:b]) for table, a, b in zip(tables, firsts, lasts, strict=True)]
        part = np.repeat(np.arange(len(held)), [len(rows) for rows in held])
        rows = np.concatenate(held)
        turn = np.lexsort((rows["first"], part, rows["low"], rows["high"]))
        high, low = rows["high"][turn], rows["low"][turn]
        again = turn[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
        for number, first, count in zip(
            part[again].tolist(), rows["first"][again].tolist(), rows["rows"][again].tolist(), strict=True
        ):
            dropped[number][first : first + count] = True
        found += len(again)
        firsts = lasts
    return found


# --- splits -----------------------------------------------------------------------------------------------------------


class _Splits:
    """Which split a number is in: of each number, or of each group of them where there are too many to hold."""

    def __init__(self, parts: Parts, dropped: list[NDArray[np.bool_]], valid: float, test: float) -> None:
        self._shift = np.uint64(0 if sum(map(len, dropped)) <= EXACT else 64 - GROUPS)
        numbers: list[NDArray[np.uint64]] = []
        sizes: list[NDArray[np.int64]] = []
        grouped = np.zeros(1 << GROUPS, np.int64)
        for part, drop in enumerate(dropped):
            own, size = parts.orders(part)[~drop] >> self._shift, parts.rows(part)["size"][~drop].astype(np.int64)
            if self._shift:
                np.add.at(grouped, own.astype(np.int64), size)
            else:
                numbers.append(own)
                sizes.append(size)
        if self._shift:
            present = np.flatnonzero(grouped)
            numbers, sizes = [present.astype(np.uint64)], [grouped[present]]
        every = np.concatenate(numbers)
        self._known, first = np.unique(every, return_index=True)
        self._splits = assign_splits(np.concatenate(sizes), every, valid, test)[first]

    def of(self, orders: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """The split of each number; of those of duplicates it is that of the first, which they are not in."""
        where = np.searchsorted(self._known, orders >> self._shift)
        return self._splits[np.minimum(where, len(self._known) - 1)]


def assign_splits(sizes: NDArray[np.int64], orders: NDArray[np.uint64], valid: float, test: float) -> NDArray[np.uint8]:
    """The split of each document, as a number of SPLITS. Documents of one order number stay together.

    Going through them by order number, test takes until it holds its fraction of the bytes, then valid, and train has
    the rest. Of three different contents each split gets one, of two train and valid, one is for training. A content
    that repeats until it is more than a quarter of all bytes goes last, since it would make a poor test.
    """
    contents, group = np.unique(orders, return_inverse=True)
    weights = np.bincount(group, weights=sizes)
    total = float(weights.sum())
    turn = np.argsort(weights * 4 > total, kind="stable")
    reached = np.cumsum(weights[turn], dtype=np.float64)
    spare = len(contents) - 1
    splits = np.zeros(len(contents), np.uint8)
    first = 0
    for name, fraction, kept in (("test", test, int(valid > 0)), ("valid", valid, 0)):
        target = (float(reached[first - 1]) if first else 0.0) + fraction * total
        wanted = int(np.searchsorted(reached, target)) + 1 if fraction > 0 else first
        last = min(wanted, max(spare - kept, first))
        splits[turn[first:last]] = SPLITS.index(name)
        first = last
    return splits[group]
