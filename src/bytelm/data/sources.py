"""Any files as a stream of documents: folders, patterns, single files, standard input, datasets."""

# os.path answers False where Path raises, at links and folders that are not readable.
# ruff: noqa: PTH112, PTH114, PTH116, PTH118, PTH119

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from itertools import chain
from pathlib import Path
from typing import cast

from bytelm.data import hub, places
from bytelm.data.decode import MAX_WINDOW
from bytelm.data.files import shown
from bytelm.data.formats import ANY_ORDER, Reader, Text, suffixes
from bytelm.data.options import MAX_BAD
from bytelm.data.report import EXCLUDED, SourceReport
from bytelm.errors import DataError

STDIN = "-"


@dataclass(frozen=True)
class Document:
    """One document: the file it comes from ("a.tar/b.txt" where that is in an archive), and its bytes.

    They come in pieces of at most 1 MiB, at least one of them.

    The pieces are read lazily, and are available only until the next document is requested.
    """

    name: str
    pieces: Iterator[bytes]

    @property
    def suffix(self) -> str:
        """The kind of file, such as ".py" (also of "x.py.gz"), or "" if the name has no suffix."""
        return suffixes(self.name)[0]


@dataclass(frozen=True)
class FoundFile:
    """A file, and what the system or a store knows of it: nothing, of standard input or a dataset."""

    path: str
    stat: os.stat_result | places.Status | None

    @property
    def name(self) -> str:
        """What it is called: its path, and of a URL what is not a query, as in "x.jsonl.gz?download=true"."""
        return places.plain(self.path) if isinstance(self.stat, places.Status) else self.path


def documents(
    paths: Sequence[str | Path],
    text_field: str | None = "text",
    report: SourceReport | None = None,
    exclude: Sequence[str | Path] = (),
    max_bad: float = MAX_BAD,
    max_window: int = MAX_WINDOW,
) -> Iterator[Document]:
    """The documents of `paths` in a fixed order; see `Document` for how long one can be read.

    A path is a folder (read to its depths in order of names, without hidden names, links to folders and links that
    lead outside it), a pattern ("logs/**/*.txt", which matches no hidden names), a file, or "-" for standard input. A
    file found twice is read once; the folders `exclude` are skipped. Names ending in .gz, .bz2, .xz, .lzma or
    .zst are decompressed, and the files in a .tar or .zip are read as if they lay in a folder of its name. Unless
    `text_field` is None, each line of a .jsonl file is a document, the string in that field, and each row of a .parquet
    file the string or the bytes in that column; "hf:NAME" is a dataset, see `hub`; "s3://BUCKET/NAME" and other URLs
    are files, folders and patterns elsewhere, see `places`.

    What is not a file that can be read is noted in `report` and skipped. Raises DataError for a path that is not
    there, a file that changes while it is read, damage, more than the fraction `max_bad` of bad lines or rows, and a
    compressed file whose window is larger than `max_window` MiB; MissingExtraError for a format whose package is not
    installed.
    """
    report = SourceReport() if report is None else report
    reader = Reader(report, text_field, max_bad, max_window)
    for found in find_files(paths, exclude, report):
        if hub.is_dataset(found.path):
            rows = hub.texts(found.path, text_field, report, max_bad)
            yield from _given(((found.path, row) for row in rows), report)
            continue
        try:
            file = _opened(found)
        except OSError as error:
            report.skip(found.path, _why(error))
            continue
        report.files += 1
        try:
            yield from _given(reader.texts(file, found.name), report)
            if found.stat is not None:
                _check_unchanged(found.path, found.stat, file)
        except OSError as error:
            raise DataError(f"{shown(found.path)} cannot be read: {_why(error)}") from error
        finally:
            if found.stat is not None:
                file.close()


def _given(texts: Iterable[Text], report: SourceReport) -> Iterator[Document]:
    """The texts as documents. Empty ones are skipped and counted, and so is a file without any text."""
    before, given = report.left_out, False
    for name, text in texts:
        first = next(text, None)
        if first is None:
            report.empty += 1
        else:
            given = True
            yield Document(name, chain([first], text))
    if not given and report.left_out == before:
        report.empty += 1


def _check_unchanged(path: str, before: os.stat_result | places.Status, file: BufferedIOBase) -> None:
    if isinstance(before, places.Status):
        places.check_unchanged(path, before)
        return
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(
            f"{shown(path)} changed while it was read, from {before.st_size} bytes to {after.st_size}: "
            "wait until it is complete, or give a copy"
        )


def fingerprint(paths: Sequence[str | Path], exclude: Sequence[str | Path] = ()) -> str | None:
    """A hash of the names, sizes and times of change of the files that `documents` would read.

    It costs no reading, and is another one when the data changed. Of a dataset it is the commit that its hub names.
    None where standard input is among the paths.
    """
    digest = hashlib.sha256()
    for found in find_files(paths, exclude, SourceReport()):
        if hub.is_dataset(found.path):
            digest.update(f"{found.path}\0{hub.fingerprint(found.path)}\0".encode())
        elif found.stat is None:
            return None
        elif isinstance(found.stat, places.Status):
            digest.update(f"{found.path}\0{found.stat.st_size}\0{found.stat.mark}\0".encode())
        else:
            digest.update(os.fsencode(found.path))
            digest.update(f"\0{found.stat.st_size}\0{found.stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def find_files(paths: Sequence[str | Path], exclude: Sequence[str | Path], report: SourceReport) -> Iterator[FoundFile]:
    """The regular files of `paths`, each once, not opened; standard input and datasets as they are."""
    seen: defaultdict[int, set[int]] = defaultdict(set)  # device → numbers of files
    urls: set[str] = set()
    excluded = {os.path.realpath(folder) for folder in exclude}

    for path in chain.from_iterable(expanded(str(path)) for path in paths):
        if path == STDIN or hub.is_dataset(path):
            yield FoundFile(path, None)
            continue
        if places.is_url(path):
            for url, known in places.found(path):
                if url not in urls:
                    urls.add(url)
                    yield FoundFile(url, known)
            continue
        for name in _walk(path, excluded, report.skip):
            try:
                status = os.stat(name)
            except OSError as error:
                report.skip(name, _why(error))
                continue
            if not stat.S_ISREG(status.st_mode):
                report.skip(name, f"not a file but a {_kind(status.st_mode)}")
            elif status.st_ino not in seen[status.st_dev]:
                seen[status.st_dev].add(status.st_ino)
                yield FoundFile(name, status)


def expanded(path: str) -> list[str]:
    """The path itself where there is such a thing, else what it matches as a pattern. DataError for nothing."""
    if path == STDIN or hub.is_dataset(path) or places.is_url(path) or os.path.lexists(path):
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
        skip(root, EXCLUDED)
        return
    if not os.path.isdir(root):
        yield root
        return

    def failed(error: OSError) -> None:
        skip(str(error.filename), _why(error))

    for folder, folders, names in os.walk(root, onerror=failed):  # goes into no links
        real = os.path.normpath(os.path.join(inside, os.path.relpath(folder, root)))
        folders[:] = sorted(name for name in folders if not _hidden([name]))
        for path in [os.path.join(folder, name) for name in folders]:
            if os.path.islink(path):
                skip(path, "a link to a folder")
            elif os.path.join(real, os.path.basename(path)) in excluded:
                skip(path, EXCLUDED)
                folders.remove(os.path.basename(path))
        for name in sorted(names):
            if _hidden([name]):
                continue
            path, target = os.path.join(folder, name), os.path.join(real, name)
            link = os.path.islink(path)
            target = os.path.realpath(path) if link else target  # which stats every folder above it
            if target in excluded:
                skip(path, EXCLUDED)
            elif link and not Path(target).is_relative_to(inside):
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


def _opened(found: FoundFile) -> BufferedIOBase:
    if found.stat is None:
        return cast(BufferedReader, sys.stdin.buffer)
    if not isinstance(found.stat, places.Status):
        return _open(found.path)
    if suffixes(found.name)[0] in ANY_ORDER:
        return places.fetched(found.path, found.stat)
    return places.opened(found.path, found.stat)


def _open(path: str) -> BufferedReader:
    """Open a file for reading, never waiting: what was a file may have been replaced by a pipe since it was found."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
