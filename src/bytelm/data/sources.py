"""Any files as a stream of documents: folders, patterns, single files, standard input, compressed files, JSON lines."""

# os.path answers False where Path raises, at links and folders that may not be looked into.
# ruff: noqa: PTH112, PTH114, PTH116, PTH118, PTH119

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from bytelm.data.decode import COMPRESSED, decoded, in_pieces
from bytelm.data.files import PIECE, shown
from bytelm.errors import DataError

STDIN = "-"
_LONGEST_LINE = 64 << 20  # bytes of one JSON line; a longer one is a bad line, so that no file can fill the memory


@dataclass(frozen=True)
class Document:
    """One document: the file it comes from, and its bytes in pieces of at most 1 MiB, at least one of them.

    The pieces are read when they are asked for, and can be had only until the next document is asked for.
    """

    name: str
    pieces: Iterator[bytes]

    @property
    def suffix(self) -> str:
        """The kind of file, such as ".py" (also of "x.py.gz"), or "" where the name does not tell."""
        return suffixes(self.name)[0]


@dataclass
class SourceReport:
    """What was met while looking for documents."""

    files: int = 0  # regular files looked at, standard input included
    empty: int = 0  # documents without a byte, which are not given
    bad_lines: int = 0  # JSON lines that could not be used
    skipped: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (name, why)
    converted: dict[str, int] = field(default_factory=dict[str, int])  # "resized" → documents, where a modality did it

    def skip(self, name: str, reason: str) -> None:
        """Note what is left out, and why."""
        self.skipped.append((shown(name), reason))

    def losses(self) -> list[str]:
        """What is not in the documents: how many files are left out, the first and why, and what was converted."""
        count = len(self.skipped)
        skipped = (
            [f"{count} skipped ({'the first ' if count > 1 else ''}{': '.join(self.skipped[0])})"] if count else []
        )
        return skipped + [f"{documents} {how}" for how, documents in self.converted.items()]

    def nothing(self, paths: Sequence[str | Path]) -> DataError:
        """The error of `paths` in which there was not a byte."""
        where = ", ".join(shown(str(path)) for path in paths) or "no paths at all"
        skipped = "".join(f"; skipped {name}: {reason}" for name, reason in self.skipped[:3])
        more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
        return DataError(
            f"no bytes found in {where}, looked at {self.files} files{skipped}{more}: name files that hold some"
        )


@dataclass(frozen=True)
class _Found:
    path: str
    stat: os.stat_result


def documents(
    paths: Sequence[str | Path],
    text_field: str | None = "text",
    report: SourceReport | None = None,
    exclude: Sequence[str | Path] = (),
) -> Iterator[Document]:
    """The documents of `paths` in a fixed order; see `Document` for how long one can be read.

    A path is a folder (read to its depths in order of names, without hidden names, links to folders and links that
    lead outside it), a pattern ("logs/**/*.txt", which matches no hidden names), a file, or "-" for standard input. A
    file met twice is read once; nothing in the folders `exclude` is looked at. Names ending in .gz, .xz or .zst are
    decompressed; each line of a .jsonl file is a document, the string in its `text_field`, unless that is None.

    What is not a file that can be read is noted in `report` and skipped. Raises DataError for a path that is not
    there, damaged compressed data, and a file with more than 0.1 % bad JSON lines; MissingExtraError for .zst without
    zstandard.
    """
    report = SourceReport() if report is None else report
    for found in _find(paths, exclude, report):
        try:
            file = sys.stdin.buffer if found is None else _open(found.path)
        except OSError as error:
            report.skip(found.path if found else STDIN, _why(error))
            continue
        name = STDIN if found is None else found.path
        report.files += 1
        try:
            yield from _read(file.read, name, text_field, report)
        except OSError as error:
            raise DataError(f"{shown(name)} cannot be read: {_why(error)}") from error
        finally:
            if found is not None:
                file.close()


def fingerprint(paths: Sequence[str | Path], exclude: Sequence[str | Path] = ()) -> str | None:
    """A hash of the names, sizes and times of change of the files that `documents` would read.

    It costs no reading, and is another one when the data changed. None where standard input is among the paths.
    """
    digest = hashlib.sha256()
    for found in _find(paths, exclude, SourceReport()):
        if found is None:
            return None
        digest.update(os.fsencode(found.path))
        digest.update(f"\0{found.stat.st_size}\0{found.stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def weigh(paths: Sequence[str | Path], exclude: Sequence[str | Path] = ()) -> int | None:
    """The bytes of the files that `documents` would read, as they lie on the disk. None for standard input."""
    found = list(_find(paths, exclude, SourceReport()))
    return None if None in found else sum(file.stat.st_size for file in found if file is not None)


def _find(paths: Sequence[str | Path], exclude: Sequence[str | Path], report: SourceReport) -> Iterator[_Found | None]:
    """The regular files of `paths`, each once; None stands for standard input."""
    seen: set[tuple[int, int]] = set()
    excluded = {os.path.realpath(folder) for folder in exclude}

    for path in chain.from_iterable(expanded(str(path)) for path in paths):
        if path == STDIN:
            yield None
            continue
        for name in _walk(path, excluded, report.skip):
            try:
                status = os.stat(name)
            except OSError as error:
                report.skip(name, _why(error))
                continue
            if not stat.S_ISREG(status.st_mode):
                report.skip(name, f"not a file but a {_kind(status.st_mode)}")
            elif (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield _Found(name, status)


def expanded(path: str) -> list[str]:
    """The path itself where there is such a thing, else what it matches as a pattern. DataError for nothing."""
    if path == STDIN or os.path.lexists(path):
        return [path]
    parts = Path(path).parts
    magic = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if magic is None:
        raise DataError(f"no such file or folder: {shown(path)}")
    base = Path(*parts[:magic])
    try:
        found = base.glob(str(Path(*parts[magic:])))  # not the glob module, whose ** follows links into loops
        matches = sorted(match for match in found if not _hidden(match.relative_to(base).parts))
    except ValueError as error:
        raise DataError(f"{shown(path)} is not a pattern: {error}") from error
    if not matches:
        raise DataError(f"no such file or folder, and nothing matches it as a pattern: {shown(path)}")
    return [str(match) for match in matches]


def _walk(root: str, excluded: set[str], skip: Callable[[str, str], None]) -> Iterator[str]:
    """The root itself, or everything in it that is neither a folder nor hidden nor a link that leads outside."""
    inside = os.path.realpath(root)
    if any(Path(inside).is_relative_to(folder) for folder in excluded):
        skip(root, "excluded")
        return
    if not os.path.isdir(root):
        yield root
        return

    def failed(error: OSError) -> None:
        skip(str(error.filename), _why(error))

    for folder, folders, names in os.walk(root, onerror=failed):  # goes into no links
        folders[:] = sorted(name for name in folders if not _hidden([name]))
        for path in [os.path.join(folder, name) for name in folders]:
            if os.path.islink(path):
                skip(path, "a link to a folder")
            elif os.path.realpath(path) in excluded:
                skip(path, "excluded")
                folders.remove(os.path.basename(path))
        for path in [os.path.join(folder, name) for name in sorted(names) if not _hidden([name])]:
            if os.path.realpath(path) in excluded:
                skip(path, "excluded")
            elif os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(inside):
                skip(path, "a link that leads outside the folder")
            else:
                yield path


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))
    return next((name for test, name in kinds if test(mode)), "folder")


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _open(path: str) -> BinaryIO:
    """Open a file for reading, never waiting: what was a file may have been replaced by a pipe since it was found."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


@functools.lru_cache(1)  # a file of a million JSON lines asks a million times
def suffixes(name: str) -> tuple[str, str]:
    """The kind of the content and the kind of the compression: (".py", ".gz") of "x.py.gz"."""
    path = PurePath(name)
    outer = path.suffix.lower()
    return (PurePath(path.stem).suffix.lower(), outer) if outer in COMPRESSED else (outer, "")


def _read(read: Callable[[int], bytes], name: str, text_field: str | None, report: SourceReport) -> Iterator[Document]:
    """The documents of one file, which `read` reads on; those without a byte are counted and left out."""
    kind, compression = suffixes(name)
    pieces = decoded(read, compression, shown(name)) if compression else iter(lambda: read(PIECE), b"")
    texts = _json_texts(pieces, name, text_field, report) if kind == ".jsonl" and text_field is not None else [pieces]
    for text in texts:
        first = next(text, None)
        if first is None:
            report.empty += 1
        else:
            yield Document(name, chain([first], text))


def _json_texts(pieces: Iterator[bytes], name: str, text_field: str, report: SourceReport) -> Iterator[Iterator[bytes]]:
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
    report.bad_lines += bad
    if bad * 1000 > lines:
        raise DataError(
            f"{shown(name)}: {bad} of {lines} lines are not JSON objects with a string in {text_field!r}, the first "
            f"is line {first_bad} (limit: 0.1 %): correct the file or name another --text-field"
        )


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
        return b"".join(held) if size <= _LONGEST_LINE else None

    for piece in pieces:
        for index, part in enumerate(piece.split(b"\n")):
            if index > 0:
                yield line()
                held, size = [], 0
            size += len(part)
            if size <= _LONGEST_LINE:
                held.append(part)
    if size:
        yield line()
