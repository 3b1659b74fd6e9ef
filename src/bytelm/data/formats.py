"""What is in one file: its bytes, decompressed, or a document per JSON line, row of Parquet or file in an archive."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import PurePath
from typing import Any

from bytelm.data import apart
from bytelm.data.archives import Meter, tar_members, zip_members
from bytelm.data.decode import COMPRESSED, MAX_WINDOW, decoded, in_pieces
from bytelm.data.files import LONGEST, PIECE, shown, size_of
from bytelm.data.options import MAX_BAD
from bytelm.data.report import SourceReport, check_bad
from bytelm.errors import DataError

ARCHIVES = frozenset({".tar", ".zip"})
ANY_ORDER = frozenset({".zip", ".parquet"})  # which are not read from the beginning to the end
JSON_LINES = frozenset({".jsonl", ".ndjson"})
# Kinds of files of many documents → what one of them is.
RECORDS = dict.fromkeys(JSON_LINES, "line") | {".parquet": "row"} | dict.fromkeys(ARCHIVES, "member")
_TARBALLS = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
Text = tuple[str, Iterator[bytes]]  # the name of what holds a document, and its pieces


@functools.lru_cache(1)  # called once per JSON line
def suffixes(name: str) -> tuple[str, str]:
    """The kind of the content and the format of the compression: (".py", ".gz") of "x.py.gz"; "x.tgz" is "x.tar.gz"."""
    path = PurePath(name)
    outer = path.suffix.lower()
    if outer in _TARBALLS:
        return ".tar", _TARBALLS[outer]
    return (PurePath(path.stem).suffix.lower(), COMPRESSED[outer]) if outer in COMPRESSED else (outer, "")


@dataclass(frozen=True)
class Reader:
    """How files become documents: `text_field`, `max_bad` and `max_window` are those of `DataConfig`.

    Without a `text_field` the files of JSON lines and Parquet are files like any other. What is left out is noted in
    `report`.
    """

    report: SourceReport
    text_field: str | None = "text"
    max_bad: float = MAX_BAD
    max_window: int = MAX_WINDOW

    def texts(self, file: BufferedIOBase, name: str) -> Iterator[Text]:
        """Each document of one file in pieces of at most PIECE bytes, none of them for one without a byte.

        Raises DataError for damage, MissingExtraError for a format whose package is not installed.
        """
        kind, compression = suffixes(name)
        if compression and (kind == ".zip" or (kind == ".parquet" and self.text_field is not None)):
            raise DataError(f"{shown(name)} is a compressed {kind} file, which cannot be read in parts: decompress it")
        if kind == ".parquet" and self.text_field is not None:
            rows = apart.texts(file, shown(name), self.text_field, self.report, self.max_bad)
            yield from ((name, row) for row in rows)
            return
        if kind not in ARCHIVES:
            yield from self._contents(file.read, name)
            return
        size = size_of(file)
        meter = Meter(shown(name), size)
        if kind == ".zip":
            members = zip_members(file, name, self.report) if size else iter(())
        else:
            members = tar_members(self._decompressed(file.read, name), name, self.report)
        for inner, read in members:
            kind = suffixes(inner)[0]
            if kind in ARCHIVES or (kind == ".parquet" and self.text_field is not None):
                self.report.skip(inner, f"a {kind} file in an archive, which is not opened")
            else:
                yield from self._contents(read, inner, meter)

    def _decompressed(self, read: Callable[[int], bytes], name: str) -> Iterator[bytes]:
        compression = suffixes(name)[1]
        if compression:
            return decoded(read, compression, shown(name), self.max_window)
        return iter(lambda: read(PIECE), b"")

    def _contents(self, read: Callable[[int], bytes], name: str, meter: Meter | None = None) -> Iterator[Text]:
        """The documents of what is read as a stream."""
        pieces = self._decompressed(read, name)
        pieces = pieces if meter is None else meter.counted(pieces)
        if suffixes(name)[0] in JSON_LINES and self.text_field is not None:
            for text in _json_texts(pieces, shown(name), self.text_field, self.report, self.max_bad):
                yield name, text
        else:
            yield name, pieces


def _json_texts(
    pieces: Iterator[bytes], name: str, text_field: str, report: SourceReport, max_bad: float
) -> Iterator[Iterator[bytes]]:
    """The text of each JSON line, in pieces. Raises DataError after the last line when too many are bad."""
    lines = bad = first_bad = 0
    for number, line in enumerate(_lines(pieces), start=1):
        if line is not None and not line.strip():
            continue
        lines += 1
        text = None if line is None else _json_text(line, text_field)
        if text is not None:
            yield in_pieces([text])
            continue
        bad += 1
        first_bad = first_bad or number
    report.bad += bad
    what = f"lines have no string in data.text_field = {text_field!r} or are not JSON, the first is line {first_bad}"
    check_bad(name, bad, lines, what, max_bad)


def _json_text(line: bytes, text_field: str) -> bytes | None:
    try:
        record: Any = json.loads(line)
        # JSON can write halves of surrogate pairs, which strict UTF-8 cannot
        return record[text_field].encode("utf-8", "surrogatepass")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines of a stream without their line feeds; None stands for one that is too long to be held."""
    held: list[bytes] = []
    size = 0

    def line() -> bytes | None:
        return b"".join(held) if size <= LONGEST else None

    for piece in pieces:
        for index, part in enumerate(piece.split(b"\n")):
            if index > 0:
                yield line()
                held, size = [], 0
            size += len(part)
            if size <= LONGEST:
                held.append(part)
    if size:
        yield line()
