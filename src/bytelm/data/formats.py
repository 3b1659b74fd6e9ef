"""What is in one file: bytes as they are, compressed or not, or a document a JSON line or a row of a Parquet file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import PurePath
from typing import Any

from bytelm.data import apart
from bytelm.data.decode import COMPRESSED, decoded, in_pieces
from bytelm.data.files import LONGEST, PIECE, shown
from bytelm.data.report import SourceReport, check_bad
from bytelm.errors import DataError

RECORDS = {".jsonl": "line", ".parquet": "row"}  # kinds of files of many documents → what one of them is


@functools.lru_cache(1)  # a file of a million JSON lines asks a million times
def suffixes(name: str) -> tuple[str, str]:
    """The kind of the content and the kind of the compression: (".py", ".gz") of "x.py.gz"."""
    path = PurePath(name)
    outer = path.suffix.lower()
    return (PurePath(path.stem).suffix.lower(), outer) if outer in COMPRESSED else (outer, "")


def texts(
    file: BufferedIOBase, name: str, text_field: str | None, report: SourceReport, max_bad: float
) -> Iterator[Iterator[bytes]]:
    """Each document of one file in pieces of at most PIECE bytes, none of them for one without a byte.

    Raises DataError for damage, MissingExtraError for a format whose package is not installed.
    """
    kind, compression = suffixes(name)
    if kind == ".parquet" and text_field is not None:
        if compression:
            raise DataError(f"{shown(name)} is a compressed Parquet file, which cannot be read in parts: decompress it")
        yield from apart.texts(file, shown(name), text_field, report, max_bad)
        return
    read = file.read
    pieces = decoded(read, compression, shown(name)) if compression else iter(lambda: read(PIECE), b"")
    if kind == ".jsonl" and text_field is not None:
        yield from _json_texts(pieces, shown(name), text_field, report, max_bad)
    else:
        yield pieces


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
    what = f"lines have no string in data.text_field = {text_field!r} or are no JSON, the first is line {first_bad}"
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
