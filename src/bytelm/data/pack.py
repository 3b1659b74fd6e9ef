"""Packing: any files become one sequence of bytes, divided into documents and assigned to splits.

By any number of processes, on any machines that share the folder, with the same bytes (`sharing`):

DIR/parts-HASH/part-*       parts of the files (`parts`)
DIR/parts-HASH/joined-*     the parts are one corpus in DIR (`joining`), but for the index
DIR/parts-HASH/repeats-*    what of the held-out documents is found in the training documents of one part
DIR/index.json              written last; then DIR/parts-HASH is removed
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from bytelm.data.claims import held_by
from bytelm.data.corpus import INDEX, SPLITS, TABLE, Corpus, Index
from bytelm.data.decode import MAX_WINDOW
from bytelm.data.files import shown
from bytelm.data.formats import RECORDS, suffixes
from bytelm.data.joining import Parts, join
from bytelm.data.modalities.base import Modality
from bytelm.data.options import MAX_BAD, DataConfig
from bytelm.data.parts import LARGEST_PIECE, SMALLEST_PIECE, Packing, Plan, planned, save
from bytelm.data.repeats import SAMPLE, Sought, stretches
from bytelm.data.report import SourceReport, check_bad
from bytelm.data.selection import sample_evenly
from bytelm.data.sharing import SharedWork
from bytelm.data.sources import find_files, fingerprint
from bytelm.errors import DataError, ResourceError
from bytelm.units import show_bytes

PARTS = "parts-"  # how the folder of a packing that is not finished begins
PART = 1 << 28  # bytes on disk of the files of a part
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
    deduplicate: bool = False,
    shard_bytes: int = 1 << 28,
    part_bytes: int = PART,
    exclude: Sequence[str | Path] = (),
    progress: Callable[[int], None] | None = None,
    join: bool = False,
    others: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Corpus:
    """Write the documents of `paths` (see `convert.read`) as a corpus into `directory`, replacing one there.

    `text_field` to `deduplicate` are those of `DataConfig`; `progress` is called with the bytes packed so far. The
    directory itself is never read as a source, and neither are the folders `exclude`.

    Files are packed in parts of `part_bytes` on disk. What is interrupted resumes after the parts that were finished;
    of a single part nothing is left where packing fails. With `join` this process takes part in a packing of the same
    files that others are at, or may join; a finished one is opened. `others` is entered once others may join.

    Raises DataError when there are no bytes, a source is damaged, or a joined directory holds other data; ConfigError
    for fractions that leave nothing to train on; ResourceError when the directory cannot be written, has not the space
    that is known to be needed, or is in use by other processes.
    """
    options = DataConfig(text_field, valid, test, seed, max_bad, max_window, strict, deduplicate)
    directory, created = Path(directory), not Path(directory).exists()
    exclude = (*exclude, directory)
    sources = fingerprint(paths, exclude)  # before the reading, so that a change during it is noticed later
    plan = planned(paths, exclude, strict, part_bytes)
    packer = _Packer(paths, directory, plan, options, modality, exclude, shard_bytes, sources, progress)
    if not packer.begin(join):
        return Corpus.open(directory)
    try:
        packer.work.folder.mkdir(parents=True, exist_ok=True)
        with others():
            packer.run()
    except BaseException as error:
        if not join and len(plan.parts) == 1:
            with contextlib.suppress(OSError):
                _clear(directory)
        for folder in [packer.work.folder, *([directory] if created else [])]:
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless something is in it
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
    return sum(file.stat.st_size for file in found if file.stat and suffixes(file.name)[0] not in RECORDS)


def check_space(directory: Path, needed: int) -> None:
    """Raise ResourceError where the disk of `directory`, which need not be there, has no room for `needed` bytes."""
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    # What a new pack takes the place of, and what an interrupted one has done.
    held = sum(
        path.stat().st_size for pattern in ("", f"{PARTS}*/*/") for path in directory.glob(f"{pattern}shard-*.bin")
    )
    free = shutil.disk_usage(there).free + held
    if needed > free:
        raise ResourceError(
            f"packing takes {show_bytes(needed)} or more in {shown(str(directory))}, and {show_bytes(free)} are free: "
            "choose another disk, or give fewer files"
        )


@dataclasses.dataclass
class _Packer:
    """One process's share in a packing."""

    paths: Sequence[str | Path]
    directory: Path
    plan: Plan
    options: DataConfig
    modality: Modality | None
    exclude: Sequence[str | Path]
    shard_bytes: int
    sources: str | None
    progress: Callable[[int], None] | None

    @cached_property
    def work(self) -> SharedWork:
        """The folder of what is not finished, named by everything that decides the bytes."""
        table = self.modality and self.modality.table
        identity = [self.sources or secrets.token_hex(8), dataclasses.asdict(self.options), table]
        name = sha256(json.dumps([*identity, self.shard_bytes, self.plan.sizes]).encode()).hexdigest()[:16]
        return SharedWork(self.directory / f"{PARTS}{name}", (self.directory / INDEX).exists, self._waiting)

    def begin(self, join: bool) -> bool:
        """Make the directory ready; False where a joined packing is finished. Raises DataError and ResourceError."""
        where, folder = shown(str(self.directory)), self.work.folder
        others = [path for path in self.directory.glob(f"{PARTS}*") if path != folder]
        if join and self.sources is None:
            raise DataError("standard input cannot be packed by several processes: give files")
        if join and (self.directory / INDEX).exists():
            index = Index.load(self.directory)
            table = self.modality and self.modality.table
            if (index.source_fingerprint, index.options, index.modality) != (self.sources, self.options, table):
                raise DataError(f"{where} is a packed corpus of other files or options: name another folder")
            return False
        for path in [*others, *([] if join else [folder])]:
            if holder := held_by(path):
                way = "--join takes part in that, " if path == folder else ""
                raise ResourceError(f"{where} is being packed by {holder}: {way}wait for it, or name another folder")
        begun = folder.exists()
        if self.modality is None and not (join and begun):
            check_space(self.directory, self.plan.needed)
        for path in others:
            shutil.rmtree(path, ignore_errors=True)
        if not join and ((self.directory / INDEX).exists() or not begun):
            with contextlib.suppress(OSError):
                _clear(self.directory)
        return True

    def run(self) -> None:
        """Do this process's share of everything, until the corpus is there."""
        count = len(self.plan.parts)
        self.work.do("part", count, self._part)
        self.work.do("joined", 1, self._join)
        self.work.do("repeats", count if self._searched else 0, self._search)
        self.work.do("indexed", 1, self._index)

    def _waiting(self, done: int) -> None:
        """Show how far all processes are: by the first parts, as if none after them were done."""
        if self.progress:
            self.progress(sum(self.plan.sizes[:done]))

    def _part(self, number: int, aside: Path) -> None:
        before = sum(self.plan.sizes[: self.work.done])

        def told(bytes: int) -> None:
            if self.progress:
                self.progress(before + bytes)

        cut_at = None if len(self.plan.parts) == 1 else LARGEST_PIECE
        packing = Packing(self.options, self.modality, self.exclude, self.shard_bytes, cut_at)
        packing.part(self.plan.parts[number], aside, told)

    def _join(self, number: int, aside: Path) -> None:
        parts = Parts([self.work.path("part", number) for number in range(len(self.plan.parts))])
        report = parts.report(dataclasses.replace(self.plan.report, reasons=dict(self.plan.report.reasons)))
        if not any(index.bytes for index in parts.indices):
            raise report.nothing(self.paths)
        if self.modality is not None and len(parts.folders) > 1:
            what = "files are damaged or not what their names say"
            check_bad(f"--as {self.modality.name}", report.bad, report.files, what, self.options.max_bad)
        joined = join(parts, self.directory, self.options, report, aside.name)
        table, grain = self.modality and self.modality.table, self.modality.grain if self.modality else 1
        own = (joined.report, self.sources, grain, table, self.options)
        aside.mkdir()
        Index(joined.bytes, joined.shards, joined.documents, joined.suffixes, *own).write(aside)

    @cached_property
    def _corpus(self) -> Corpus:
        """The corpus before its index is written."""
        return Corpus(self.directory, Index.load(self.work.path("joined", 0)))

    @property
    def _searched(self) -> bool:
        """Whether held-out documents are looked for in training documents.

        Equal documents are in one split, so that of those that have one size and are read whole there is nothing to
        find.
        """
        return self.modality is None or self.modality.grain <= SMALLEST_PIECE

    @cached_property
    def _sought(self) -> Sought:
        corpus, half = self._corpus, SAMPLE // 2
        held_out = [d for split in SPLITS[1:] if corpus.bytes(split) for _, d in sample_evenly(corpus, split, half)]
        return Sought(held_out)

    def _search(self, number: int, aside: Path) -> None:
        ends = np.cumsum([0, *(Index.load(self.work.path("part", n)).bytes for n in range(len(self.plan.parts)))])
        start, stop = int(ends[number]), int(ends[number + 1])
        for segment in stretches(self._corpus, "train", start, stop):
            self._sought.look(*segment)
            if self.progress:
                self.progress(self._corpus.total)
        save(aside, np.packbits(self._sought.found))

    def _index(self, number: int, aside: Path) -> None:
        index = self._corpus.index
        if self._searched:
            for part in range(len(self.plan.parts)):
                bits = np.load(self.work.path("repeats", part), allow_pickle=False)
                self._sought.found |= np.unpackbits(bits)[: len(self._sought.found)].astype(bool)
            index = dataclasses.replace(index, repeated=self._sought.covered(), looked=self._sought.looked)
        index.write(self.directory)
        shutil.rmtree(self.work.folder, ignore_errors=True)


def _clear(directory: Path) -> None:
    """Remove what an earlier pack wrote."""
    for pattern in (*_OWN_FILES, f"{PARTS}*"):
        for path in directory.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
