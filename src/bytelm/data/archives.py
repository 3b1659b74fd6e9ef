"""Archives: the files in a .tar or a .zip, one after another, streamed and never extracted to disk.

A name in an archive is only a name: nothing is extracted, so that one like "../../etc/passwd" leads nowhere.
"""

from __future__ import annotations

import contextlib
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from io import BufferedIOBase
from itertools import chain
from typing import IO, Any, cast

from bytelm.data.decode import RATIO, SLACK, swells
from bytelm.data.files import LONGEST, PIECE, shown
from bytelm.data.report import SourceReport
from bytelm.errors import DataError

Member = tuple[str, Callable[[int], bytes]]  # its name, and a reader that is valid until the next member

_LISTS = (b"V", b"D")  # of GNU tar: the archive's label, and the names that a folder had; they hold no file
_HEADERS = 1 << 20  # bytes of headers before one file of a .tar; tarfile holds them all
_BLOCK = tarfile.BLOCKSIZE
# zipfile bounds the memory of one read with these alone: of bz2 it makes gigabytes, of lzma what the file declares.
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 1  # a bit of the flags
# What the readers raise at damage, or (RuntimeError) at what they were not made for.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, ValueError, LookupError, OverflowError, RuntimeError),
)


class Meter:
    """Counts what all members of one archive become, decompressed: the bomb limit applies to them together."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._made, self._limit = 0, RATIO * size + SLACK

    def counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces. Raises DataError above a thousand times the archive's size plus 64 MiB."""
        for piece in pieces:
            self._made += len(piece)
            if self._made > self._limit:
                raise swells(self._name, f"{self._made} bytes", "its size ")
            yield piece


def tar_members(pieces: Iterator[bytes], name: str, report: SourceReport) -> Iterator[Member]:
    """The files in a .tar that is read as a stream, in its order. Raises DataError for damage.

    Folders and hidden names are skipped, as on disk; links, devices and the like are noted in `report`.
    """
    first = next(pieces, None)
    if first is None:
        return
    tape = _Tape(chain([first], pieces), name)
    try:
        with tarfile.TarFile(fileobj=cast(IO[bytes], tape), encoding="utf-8", errors="surrogateescape") as archive:
            while (member := _next(archive, tape)) is not None:
                if member.isdir() or member.type in _LISTS:
                    continue
                inner = _inside(name, member.name, report)
                if inner is None:
                    continue
                if not member.isreg():
                    kind = "link" if member.issym() or member.islnk() else "device, pipe or part of a file"
                    report.skip(inner, f"a {kind} in an archive")
                elif content := archive.extractfile(member):
                    yield inner, partial(_read, content.read, inner)
        if tape.last.strip(b"\0"):  # where tarfile ends without a word
            raise tarfile.ReadError(f"no header after {tape.tell() - _BLOCK} bytes")
        if tape.rest():
            report.skip(name, "bytes after the end of an archive")
    except GeneratorExit:  # left half read, perhaps as the interpreter ends and the names below are gone
        raise
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def zip_members(file: BufferedIOBase, name: str, report: SourceReport) -> Iterator[Member]:
    """The files in a .zip, in the order of its directory. Raises DataError for damage.

    What `tar_members` passes over or notes is here too, and what is encrypted, or compressed in another way than
    "deflate", is noted.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], _Directory(file, name))) as archive:
            for member in archive.infolist():
                inner = None if member.is_dir() else _inside(name, member.filename, report)
                if inner is None:
                    continue
                kind = stat.S_IFMT(member.external_attr >> 16)
                if kind not in (0, stat.S_IFREG):
                    report.skip(inner, f"a {'link' if kind == stat.S_IFLNK else 'device or pipe'} in an archive")
                elif member.flag_bits & _ENCRYPTED:
                    report.skip(inner, "encrypted")
                elif member.compress_type not in _METHODS:
                    report.skip(inner, f"compressed by a method not read in a .zip: number {member.compress_type}")
                else:
                    with archive.open(member) as content:
                        yield inner, partial(_read, content.read, inner)
    except GeneratorExit:  # left half read, perhaps as the interpreter ends and the names below are gone
        raise
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _next(archive: tarfile.TarFile, tape: _Tape) -> tarfile.TarInfo | None:
    """The next member. What tarfile would remember of all of them is forgotten, and bounded of this one."""
    cast(Any, archive).members.clear()
    cast(Any, archive).pax_headers.clear()
    with tape.headers():
        return archive.next()


def _read(take: Callable[[int], bytes], name: str, size: int) -> bytes:
    """Read of a member, whose damage is found by whoever it was given to."""
    try:
        return take(size)
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _inside(name: str, member: str, report: SourceReport) -> str | None:
    """The name of a member behind that of its archive; None if it is hidden, or points outside (which is reported)."""
    parts = [part for part in member.split("/") if part not in ("", ".")]
    if ".." in parts:
        report.skip(f"{name}/{member}", "a name that points outside its archive")
        return None
    return None if any(part.startswith(".") for part in parts) else "/".join([name, *parts])


def _damaged(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{shown(name)} is damaged ({shown(reason)}): get a complete copy, or unpack what can be read of it"
    )


class _Tape:
    """A stream that is read forwards as tarfile reads files, and no further at once than `headers` allow."""

    def __init__(self, pieces: Iterator[bytes], name: str) -> None:
        self._pieces, self._name = pieces, name
        self._piece, self._used, self._at = b"", 0, 0
        self._left: int | None = _HEADERS  # bytes of headers that may still be read; the first are read by tarfile
        self.last = b""  # what was read last

    @contextlib.contextmanager
    def headers(self) -> Generator[None]:
        """What is read within is headers, which are held and therefore few."""
        self._left = _HEADERS
        yield
        self._left = None

    def tell(self) -> int:
        """The number of bytes read or skipped."""
        return self._at

    def seek(self, position: int) -> None:
        """Pass over what comes before `position`, or all there is."""
        while self._at < position and self._part(position - self._at):
            pass

    def read(self, size: int) -> bytes:
        """So many bytes; fewer at the end. Raises DataError for endless headers."""
        if self._left is not None:
            if size > self._left:
                raise DataError(f"{shown(self._name)} has a header of more than {_HEADERS} bytes: unpack it yourself")
            self._left -= size
        parts = bytearray()
        while len(parts) < size and (part := self._part(size - len(parts))):
            parts += part
        self.last = bytes(parts)
        return self.last

    def rest(self) -> bool:
        """Whether anything but zeros follows, after reading it all: a compressed archive is checked to its end."""
        found = False
        while part := self._part(PIECE):
            found = found or bool(part.strip(b"\0"))
        return found

    def _part(self, size: int) -> bytes:
        if self._used == len(self._piece):
            self._piece, self._used = next(self._pieces, b""), 0
        part = self._piece[self._used : self._used + size]
        self._used += len(part)
        self._at += len(part)
        return part


class _Directory:
    """A file as zipfile reads it: it reads the whole directory of an archive at once, whose size is bounded."""

    def __init__(self, file: BufferedIOBase, name: str) -> None:
        self._file, self._name = file, name
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """So many bytes. Raises DataError for more than 64 MiB at once."""
        if size > LONGEST:
            raise DataError(
                f"{shown(self._name)} has a directory of {size} bytes (limit: {LONGEST}): unpack it, or split it"
            )
        return self._file.read(size)
