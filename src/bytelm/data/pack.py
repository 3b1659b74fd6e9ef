"""Packing: any files become one sequence of bytes, divided into documents and assigned to splits."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.convert import read
from bytelm.data.corpus import INDEX, ROW, SPLITS, TABLE, Corpus, Index
from bytelm.data.decode import MAX_WINDOW
from bytelm.data.files import shown, write_whole
from bytelm.data.formats import RECORDS, suffixes
from bytelm.data.modalities.base import Modality
from bytelm.data.options import MAX_BAD, DataConfig
from bytelm.data.repeats import SAMPLE, repeated, stretches
from bytelm.data.report import SourceReport, StrictReport
from bytelm.data.selection import sample_evenly
from bytelm.data.shards import Shards, ShardWriter
from bytelm.data.sources import Document, find_files, fingerprint
from bytelm.errors import ResourceError
from bytelm.units import show_bytes

_SMALLEST_PIECE = 256
_LARGEST_PIECE = 1 << 20
# What pack may remove from its directory. The index goes first: without it the rest counts for nothing.
_OWN_FILES = (f"{INDEX}*", f"{TABLE}*", "shard-*.bin", "boundaries-*", "tokens-*")


def pack(
    paths: Sequence[str | Path],
    directory: str | Path,
    *,
    modality: Modality | None = None,
    text_field: str = "text",
    valid: float = 0.05,
    test: float = 0.05,
    seed: int = 0,
    max_bad: float = MAX_BAD,
    max_window: int = MAX_WINDOW,
    strict: bool = False,
    shard_bytes: int = 1 << 28,
    exclude: Sequence[str | Path] = (),
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Write the documents of `paths` (see `convert.read`) as a corpus into `directory`, replacing one there.

    `text_field`, `valid`, `test`, `seed`, `max_bad`, `max_window` and `strict` are those of `DataConfig`; `progress` is
    told the bytes packed so far. The directory itself is never read as a source, and neither are the folders
    `exclude`. Where packing fails, nothing of it is left.

    Raises DataError when there are no bytes or a source is damaged, ConfigError for fractions that leave nothing to
    train on, ResourceError when the directory cannot be written, or has not the space that is known to be needed.
    """
    options = DataConfig(text_field, valid, test, seed, max_bad, max_window, strict)
    directory = Path(directory)
    exclude = (*exclude, directory)
    sources = fingerprint(paths, exclude)  # before the reading, so that a change during it is noticed later
    if modality is None:
        check_space(directory, bytes_needed(paths, exclude))
    report = StrictReport() if strict else SourceReport()
    created = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clear(directory)
        with ShardWriter(directory, shard_bytes) as writer:
            taken = _take(read(paths, modality, text_field, report, exclude, max_bad, max_window), writer, progress)
        if writer.total == 0:
            raise report.nothing(paths)
        shards = Shards(directory, writer.shards)
        grain = modality.grain if modality is not None else None
        table = _table(shards, taken, grain, valid, test, seed)
        documents = _write_table(directory, table)
        kinds = list(taken.suffixes)
        table_of = modality and modality.table
        index = Index(writer.total, writer.shards, documents, kinds, report, sources, grain or 1, table_of, options)
        index = _looked_for_repeats(Corpus(directory, index, table))
        index.write(directory)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _clear(directory)
            if created:
                directory.rmdir()
        if isinstance(error, OSError):  # sources turn their own into DataError
            where = shown(str(directory))
            raise ResourceError(f"cannot pack into {where} ({error.strerror}): choose another place") from error
        raise
    return Corpus.open(directory)


def bytes_needed(paths: Sequence[str | Path], exclude: Sequence[str | Path] = ()) -> int:
    """The bytes that packing `paths` as they are takes on disk, by the sizes of the files; holes are written out.

    Compressed files count as they lie, and files of many documents, standard input and datasets not at all, so that
    it may be more. Raises DataError for a path that is not there.
    """
    found = find_files(paths, exclude, SourceReport())
    return sum(file.stat.st_size for file in found if file.stat and suffixes(file.path)[0] not in RECORDS)


def check_space(directory: Path, needed: int) -> None:
    """Raise ResourceError where the disk of `directory`, which need not be there, has no room for `needed` bytes."""
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    held = sum(path.stat().st_size for path in directory.glob("shard-*.bin"))  # which a new pack takes the place of
    free = shutil.disk_usage(there).free + held
    if needed > free:
        raise ResourceError(
            f"packing takes {show_bytes(needed)} or more in {shown(str(directory))}, and {show_bytes(free)} are free: "
            "choose another disk, or give fewer files"
        )


def _looked_for_repeats(corpus: Corpus) -> Index:
    """The index of a corpus, with how much of its held-out documents is in its training documents too.

    Equal documents are in one split, so that of those that have one size and are read whole there is nothing to find.
    """
    index, half = corpus.index, SAMPLE // 2
    if index.modality is not None and index.grain > _SMALLEST_PIECE:
        return index
    held_out = [d for split in SPLITS[1:] if corpus.bytes(split) for _, d in sample_evenly(corpus, split, half)]
    found, looked = repeated(held_out, stretches(corpus, "train"))
    return dataclasses.replace(index, repeated=found, looked=looked)


@dataclass(frozen=True)
class _Taken:
    """Documents as they came, before any is cut: their sizes, and their kinds as numbers of `suffixes`."""

    sizes: array[int]
    kinds: array[int]
    suffixes: dict[str, int]


def _take(documents: Iterable[Document], writer: ShardWriter, progress: Callable[[int], None] | None) -> _Taken:
    """Copy all documents into the shards."""
    taken = _Taken(array("q"), array("q"), {})
    for document in documents:
        before = writer.total
        for piece in document.pieces:
            writer.write(piece)
            if progress:
                progress(writer.total)
        taken.sizes.append(writer.total - before)
        taken.kinds.append(taken.suffixes.setdefault(document.suffix, len(taken.suffixes)))
    return taken


def _table(shards: Shards, taken: _Taken, grain: int | None, valid: float, test: float, seed: int) -> NDArray[Any]:
    """The rows of all documents after the cut."""
    piece = min(max(shards.total // 16, _SMALLEST_PIECE), _LARGEST_PIECE)
    sizes, kinds = array("q"), array("q")
    for start, size, kind in zip(itertools.accumulate(taken.sizes, initial=0), taken.sizes, taken.kinds, strict=False):
        parts = _cut_at_lines(shards, start, size, piece) if grain is None else _cut(size, piece, grain)
        sizes.extend(parts)
        kinds.extend(kind for _ in parts)
    hashes, orders = _hash(shards, sizes, seed)
    table = np.empty(len(sizes), ROW)
    table["size"] = sizes
    table["suffix"] = kinds
    table["hash"] = hashes
    table["split"] = assign_splits(np.array(sizes, np.int64), orders, valid, test)
    return table


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


def _hash(shards: Shards, sizes: array[int], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Per document the hash of its content, `[documents, 16]`, and a number drawn from that and the seed."""
    hashes, orders = bytearray(), bytearray()
    key = str(seed).encode()
    for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        content = blake2b(shards.read(start, size).data, digest_size=16).digest()
        hashes += content
        orders += blake2b(content, digest_size=8, key=key).digest()
    return np.frombuffer(hashes, np.uint8).reshape(-1, 16), np.frombuffer(orders, np.uint64)


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


def _write_table(directory: Path, table: NDArray[Any]) -> str:
    """Write the table and return its SHA-256."""
    file = io.BytesIO()
    np.save(file, table, allow_pickle=False)
    write_whole(directory / TABLE, file.getvalue())
    return sha256(file.getvalue()).hexdigest()


def _clear(directory: Path) -> None:
    """Remove what an earlier pack wrote."""
    for pattern in _OWN_FILES:
        for path in directory.glob(pattern):
            path.unlink()
