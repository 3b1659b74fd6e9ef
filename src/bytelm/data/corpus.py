"""A packed corpus: shards of bytes, and a table that says which of them are which document, in which split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.data import places
from bytelm.data.blocks import cache
from bytelm.data.files import PositionReader, sha256_of, shown, write_whole
from bytelm.data.options import DataConfig
from bytelm.data.report import SourceReport
from bytelm.data.shards import Shard, Shards, shard_path, shard_url
from bytelm.errors import DataError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
INDEX = "index.json"  # written last: without it there is no corpus, only the remains of an interrupted pack
TABLE = "documents.npy"
CHUNK = 1 << 16  # rows of the table that are held at a time
DUPLICATE = len(SPLITS)  # in place of a split: of a document that occurs before, where those are left out
VERSION = 1

# One row a document, in the order of their bytes: they follow each other without gaps, so that sizes give starts.
ROW = np.dtype([("size", "<i8"), ("suffix", "<i4"), ("split", "u1"), ("hash", "u1", (16,))])


@dataclass(frozen=True)
class DocumentTable:
    """Documents in the order of their bytes."""

    starts: NDArray[np.int64]  # [documents] position of the first byte in the corpus
    sizes: NDArray[np.int64]  # [documents] bytes, at least 1
    suffixes: NDArray[np.int32]  # [documents] index into suffix_names
    suffix_names: tuple[str, ...]  # kinds of files such as ".py"; "" where the name does not tell

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Index:
    """The fields of index.json, besides its own checksum.

    `documents` is the SHA-256 of the table; `grain` is that of the modality they come from, which `modality` has as a
    table of a configuration; `options` is how files became documents (both are None in corpora of before they were
    kept). Of `looked` held-out bytes, `repeated` also occur verbatim in the training documents (`repeats`). Where the
    shards lie elsewhere, `url` is that of their folder, and `marks` are theirs.
    """

    bytes: int
    shards: list[Shard]
    documents: str
    suffixes: list[str]
    source: SourceReport
    source_fingerprint: str | None
    grain: int = 1
    modality: dict[str, Any] | None = None
    options: DataConfig | None = None
    repeated: int = 0
    looked: int = 0
    url: str | None = None
    marks: list[str] = field(default_factory=list[str])

    def write(self, directory: Path) -> None:
        """Write it, which makes the directory a corpus."""
        fields = {"version": VERSION} | dataclasses.asdict(self)
        if self.url is None:
            del fields["url"], fields["marks"]
        fields["checksum"] = _checksum(fields)
        write_whole(directory / INDEX, (json.dumps(fields, indent=1) + "\n").encode())

    def warning(self) -> str | None:
        """A warning about contamination of the held-out bytes, or None."""
        if not self.repeated:
            return None
        return (
            f"{-(-self.repeated // 1000):,} of {-(-self.looked // 1000):,} held-out kilobytes "
            "also occur verbatim in the training data (contamination)"
        )

    @classmethod
    def load(cls, directory: Path | str) -> Index:
        """Read it, by its folder or the URL of one.

        Raises DataError naming the file when it is missing, damaged or of another version.
        """
        elsewhere = isinstance(directory, str)
        name = places.named(f"{directory}/{INDEX}") if elsewhere else shown(str(directory / INDEX))
        try:
            data = places.whole(f"{directory}/{INDEX}") if elsewhere else (directory / INDEX).read_bytes()
            fields: dict[str, Any] = json.loads(data)
            version = fields["version"]
            if version == VERSION:
                if fields.pop("checksum", None) not in (None, checksum := _checksum(fields)):  # older ones have none
                    raise ValueError(f"its checksum is not {checksum[:16]}…")
                del fields["version"]
                options = fields.pop("options", None)
                shards = [Shard(int(shard["size"]), str(shard["sha256"])) for shard in fields.pop("shards")]
                source: dict[str, Any] = fields.pop("source")
                return cls(
                    **fields,
                    shards=shards,
                    source=_report(source),
                    options=None if options is None else DataConfig(**options),
                )
        except OSError as error:
            raise DataError(f"{name} cannot be read ({error.strerror}): no data was packed there") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise DataError(f"{name} is damaged ({error}): pack the data again") from error
        raise DataError(f"{name} is of version {version}, and this bytelm reads {VERSION}: pack the data again")


def _checksum(fields: dict[str, Any]) -> str:
    return sha256(json.dumps(fields).encode()).hexdigest()


def _report(source: dict[str, Any]) -> SourceReport:
    """The report in an index. Older ones have all that was skipped by name, and speak of bad lines alone."""
    skipped = [(name, reason) for name, reason in source.pop("skipped")]
    if "bad_lines" in source:
        source["bad"] = source.pop("bad_lines")
    report = SourceReport(**source, skipped=skipped)
    if skipped and not report.reasons:
        report.skipped = []
        for name, reason in skipped:
            report.skip(name, reason)
    return report


class Rows:
    """The rows of a table of documents, left on disk and read by range: a terabyte of pages has 7 GB of them."""

    def __init__(self, path: Path, digest: str) -> None:
        """Open a table. Raises DataError naming the file when it is missing or not the one of that SHA-256."""
        name = shown(str(path))
        try:
            if sha256_of(path) != digest:
                raise DataError(f"{name} is not what was written (its SHA-256 differs): pack the data again")
            mapped: Any = np.load(path, mmap_mode="r", allow_pickle=False)  # for its header: no row is read that way
            self._offset, shape, kind = int(mapped.offset), mapped.shape, mapped.dtype
            del mapped
            self._reader = PositionReader(path, path.stat().st_size)
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{name} cannot be read ({error}): pack the data again") from error
        if kind != ROW or len(shape) != 1:
            raise DataError(f"{name} does not fit its {INDEX}: pack the data again")
        self.count = int(shape[0])
        starts, self.bytes, self.counts = [0], np.zeros(256, np.int64), np.zeros(256, np.int64)
        for first in range(0, self.count, CHUNK):
            rows = self.read(first, CHUNK)
            starts.append(starts[-1] + int(rows["size"].sum()))
            for code in np.unique(rows["split"]).tolist():
                self.bytes[code] += int(rows["size"][rows["split"] == code].sum())
                self.counts[code] += np.count_nonzero(rows["split"] == code)
        self.starts = np.array(starts, np.int64)  # [chunks + 1] position of the first byte of each CHUNK rows

    def read(self, first: int, count: int) -> NDArray[Any]:
        """`count` rows from row `first` on, fewer at the end."""
        rows = np.empty(max(0, min(count, self.count - first)), ROW)
        self._reader.read_into(self._offset + first * ROW.itemsize, rows.view(np.uint8))
        return rows


class Corpus:
    """Packed data that stays on disk: bytes, and the rows of the table of documents, are read by position."""

    def __init__(self, directory: Path, index: Index, table: Path | None = None) -> None:
        """Use `Corpus.open`, which reads the index and checks that the parts fit."""
        self.directory = directory
        self.index = index
        self.source_report = index.source
        self.source_fingerprint = index.source_fingerprint
        self.grain = index.grain  # bytes after which, and after each multiple of which, a document may be cut
        self.fingerprint = index.documents  # of the contents, their order and their splits
        self.table = table or directory / TABLE
        self._rows = Rows(self.table, index.documents)
        self._shards = Shards(directory, index.shards, index.url, index.marks)
        self._suffix_names = tuple(index.suffixes)

    @classmethod
    def open(cls, directory: str | Path) -> Corpus:
        """Open what `pack` wrote, here or by the URL of a copy.

        Of a copy elsewhere the table of documents is fetched once. Raises DataError naming the file that is missing,
        damaged or of another size.
        """
        if places.is_url(str(directory)):
            url = str(directory).rstrip("/")
            index = Index.load(url)
            known = places.statuses(url, [str(shard_path(Path(), number)) for number in range(len(index.shards))])
            for number, (shard, status) in enumerate(zip(index.shards, known, strict=True)):
                if shard.size != status.st_size:
                    name = places.named(shard_url(url, number))
                    raise DataError(f"{name} has {status.st_size} bytes and not {shard.size}: upload the folder again")
            index = dataclasses.replace(index, url=url, marks=[status.mark for status in known])
            table = cache().table(f"{url}/{TABLE}", index.documents)
            directory, corpus = table.parent, cls(table.parent, index, table)
        else:
            directory = Path(directory)
            corpus = cls(directory, Index.load(directory))
        if not corpus.total == corpus.index.bytes == corpus._rows.starts[-1]:
            raise DataError(f"{shown(str(directory / TABLE))} does not fit its {INDEX}: pack the data again")
        return corpus

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of files such as ".py" that a table's suffixes are indices into."""
        return self._suffix_names

    @property
    def elsewhere(self) -> bool:
        """Whether its shards are in a store, by their URL."""
        return self.index.url is not None

    @property
    def total(self) -> int:
        """The bytes of all documents together, duplicates that are in no split too."""
        return self._shards.total

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """The bytes from position `start`, as uint8 `[count]`. Raises DataError where a file has become shorter."""
        return self._shards.read(start, count)

    def tables(self, split: Split | None = None, start: int = 0) -> Iterator[DocumentTable]:
        """The documents of a split, or of all of them, from position `start` on, some thousand at a time."""
        for chunk in range(max(0, int(np.searchsorted(self._rows.starts, start, "right")) - 1), len(self._rows.starts)):
            rows = self._rows.read(chunk * CHUNK, CHUNK)
            if not len(rows):
                return
            sizes = rows["size"].astype(np.int64)
            starts = int(self._rows.starts[chunk]) + np.cumsum(sizes) - sizes
            chosen = starts >= start
            if split is not None:
                chosen &= rows["split"] == SPLITS.index(split)
            suffixes = rows["suffix"].astype(np.int32)
            yield DocumentTable(starts[chosen], sizes[chosen], suffixes[chosen], self._suffix_names)

    def documents(self, split: Split | None = None) -> DocumentTable:
        """The documents of a split, or of all of them, held in memory: 20 bytes each."""
        found = list(self.tables(split))
        starts = np.concatenate([np.zeros(0, np.int64), *(table.starts for table in found)])
        sizes = np.concatenate([np.zeros(0, np.int64), *(table.sizes for table in found)])
        suffixes = np.concatenate([np.zeros(0, np.int32), *(table.suffixes for table in found)])
        return DocumentTable(starts, sizes, suffixes, self._suffix_names)

    def count(self, split: Split | None = None) -> int:
        """How many documents a split has, or all together."""
        return self._rows.count if split is None else int(self._rows.counts[SPLITS.index(split)])

    def bytes(self, split: Split) -> int:
        """The bytes of a split."""
        return int(self._rows.bytes[SPLITS.index(split)])

    def verify(self) -> None:
        """Read everything and compare checksums. Raises DataError naming the first file that differs."""
        self._shards.verify()  # the table was verified when it was opened


def iterate_documents(
    corpus: Corpus,
    split: Split | None = None,
    limit_bytes: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(position, bytes) of each document of a split (or of all) in order, from position `start` on and before `stop`.

    After `limit_bytes` bytes it ends, with the last document cut short if need be.
    """
    left = corpus.total if limit_bytes is None else limit_bytes
    for table in corpus.tables(split, start):
        for position, size in zip(table.starts.tolist(), table.sizes.tolist(), strict=True):
            if left <= 0 or (stop is not None and position >= stop):
                return
            size = min(left, size)
            yield position, corpus.read(position, size)
            left -= size
