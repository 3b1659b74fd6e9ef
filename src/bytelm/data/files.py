"""Files on disk: atomic writes, random access, and printable names."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from io import BufferedIOBase, FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.errors import BytelmError, DataError, ResourceError, UsageError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

ADVISES = hasattr(os, "posix_fadvise")  # whether the system is told what will be read
PIECE = 1 << 20  # bytes: the most that is held of a stream at a time
MARK = b"bytelm: partial\n"  # at the end of a file that is not whole
LONGEST = 64 << 20  # bytes of a JSON line or a row; a longer one is a bad one, so that no file can fill the memory


def shown(name: str) -> str:
    """A file name fit for one line of a message: newlines and bytes that are not UTF-8 appear escaped."""
    return name if name.isprintable() else ascii(name)


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write `path` so that at any instant, power loss included, it holds all `parts` in turn or what it held before.

    Raises ResourceError where the disk refuses; nothing half-written is left.
    """
    aside = aside_of(path)
    try:
        with aside.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ResourceError(
            f"cannot write {shown(str(path))} ({error.strerror}): make room there, or name another place"
        ) from error


def linked(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the disk knows no links. Raises OSError."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def aside_of(path: Path) -> Path:
    """The name under which `path` is written until it is whole: one of many, as two may be at it."""
    return path.parent / f"{path.name}.{secrets.token_hex(8)}.tmp"  # not with_name: "." and "/" have none


def clear_asides(path: Path) -> None:
    """Delete what those that wrote `path` aside and were killed have left, files and folders; nobody may be writing."""
    pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError):  # it is not needed
        for other in path.parent.iterdir():
            if pattern.fullmatch(other.name):
                shutil.rmtree(other) if other.is_dir() else other.unlink()


def size_of(file: BufferedIOBase) -> int:
    """The bytes of an open file, 0 of what has no size, as a pipe has none."""
    size: int | None = getattr(getattr(file, "raw", None), "size", None)  # of one that lies elsewhere
    return os.fstat(file.fileno()).st_size if size is None else size


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last through a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PositionReader:
    """A file of a known size that is read by position. Threads and forked processes may share it.

    It is not mapped into memory: a mapped file that gets shorter kills the process, a read one raises an error.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        raised: type[BytelmError] = DataError,
        way_out: str = "pack the data again",
        *,
        random: bool = False,
    ) -> None:
        """Open `path`, which must hold exactly `size` bytes. Raises `raised`, naming it and the `way_out`, otherwise.

        `random`: what is read lies apart, so that the system should not read ahead.
        """
        self._path, self._raised, self._way_out = path, raised, way_out
        self._seeking = threading.Lock()  # where the system cannot read by position
        try:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            flags |= getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for ever
            self._descriptor = os.open(path, flags)
            # Not __del__: when the interpreter ends it may run after the modules are gone, and prints what it raises.
            # Nor at exit, where threads may still read: the system closes what is left open.
            weakref.finalize(self, os.close, self._descriptor).atexit = False
            self._opened = os.fstat(self._descriptor)
        except OSError as error:
            raise raised(f"{shown(str(path))} cannot be opened ({error.strerror}): {way_out}") from error
        if not stat.S_ISREG(self._opened.st_mode):
            raise raised(f"{shown(str(path))} is not a plain file: {way_out}")
        if self._opened.st_size != size:
            raise self._changed(self._opened.st_size, size)
        if random and ADVISES:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionReader:
        """Itself: it does not change."""
        return self

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` (contiguous) with the bytes from `start`. Raises an error where the file has become shorter."""
        view, done = out.data, 0
        while done < len(view):
            try:
                count = self._read(view[done:], start + done)
            except OSError as error:
                name = shown(str(self._path))
                raise self._raised(f"{name} cannot be read ({error.strerror}): {self._way_out}") from error
            if count == 0:
                raise self._changed(start + done, start + len(view))
            done += count

    def _read(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], start)
        with self._seeking:
            os.lseek(self._descriptor, start, os.SEEK_SET)
            data = os.read(self._descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    def prefetch(self, start: int, size: int) -> None:
        """Have the system read some bytes into its page cache, without waiting; nothing where it cannot be asked."""
        if ADVISES:
            os.posix_fadvise(self._descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def check(self, first: PositionReader | None = None) -> None:
        """Raise an error where the file was written to since it was opened; it may have been moved or deleted.

        `first`: the file as it was opened before, which must be this one.
        """
        now, opened = os.fstat(self._descriptor), (first or self)._opened
        if now.st_size != opened.st_size:
            raise self._changed(now.st_size, opened.st_size)
        if now.st_mtime_ns != opened.st_mtime_ns or not os.path.samestat(now, opened):
            raise self._raised(f"{shown(str(self._path))} was written to while it was in use: {self._way_out}")

    def _changed(self, found: int, wanted: int) -> BytelmError:
        name = shown(str(self._path))
        return self._raised(f"{name} changed after it was written, from {wanted} bytes to {found}: {self._way_out}")


class PositionWriter:
    """A file that is written by position, by one process, under a name that it has until it is whole.

    It ends with MARK until then, so that no file of anybody else's is written to. Raises ResourceError where the disk
    refuses, or another process has it.
    """

    def __init__(self, path: Path, size: int, way_out: str = "name another place") -> None:
        """Open a file, which may be there: it is as it was, and read as if zeros followed, until it is written to.

        Raises UsageError for one that is neither empty nor MARKed. `way_out`: what errors say to do.
        """
        self.path, self._size, self._way_out, self._sized = path, size, way_out, False
        while True:
            try:
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
                self._file = FileIO(os.open(path, flags, 0o666), "r+")  # of a link, another file would be written
            except OSError as error:
                raise self._refused(error) from error
            if not _locked(self._file):
                self._file.close()
                raise ResourceError(f"{shown(str(path))} is written by another process: wait for it, or {way_out}")
            if self._named():
                break
            self._file.close()  # the other process was done, and moved it, before it was locked here
        if not self.empty and not self._marked():
            self._file.close()
            raise UsageError(
                f"{shown(str(path))} exists and is not of an interrupted command: move it away, or {way_out}"
            )

    @property
    def empty(self) -> bool:
        """Whether it has no bytes."""
        return os.fstat(self._file.fileno()).st_size == 0

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes from `start`, zeros where none were written."""
        self._file.seek(start)
        found = np.frombuffer(self._file.read(len(out)), np.uint8)
        out[: len(found)], out[len(found) :] = found, 0

    def write(self, start: int, data: NDArray[np.uint8]) -> None:
        """Write bytes from `start` on."""
        try:
            if not self._sized:
                self._put(self._size, MARK)
                self._file.truncate(self._size + len(MARK))
                self._sized = True
            self._put(start, data.tobytes())
        except OSError as error:
            raise self._refused(error) from error

    def sync(self) -> None:
        """Make what was written last through a power loss."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def move(self, path: Path) -> None:
        """Give it another name, for good: what was written lasts through a power loss, under one of the two."""
        self.sync()  # what takes long is done while it has its mark
        try:
            self._file.truncate(self._size)
            self.sync()
            self.path.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise self._refused(error) from error

    def delete(self) -> None:
        """Delete it, unless it was moved."""
        if self._named():
            self.path.unlink()

    def close(self) -> None:
        """Nothing is read or written any more."""
        self._file.close()

    def _put(self, start: int, data: bytes) -> None:
        self._file.seek(start)
        rest = memoryview(data)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._file.write(rest) :]

    def _marked(self) -> bool:
        self._file.seek(max(0, os.fstat(self._file.fileno()).st_size - len(MARK)))
        return self._file.read(len(MARK)) == MARK

    def _named(self) -> bool:
        """Whether its name is that of this file still."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.lstat())
        except FileNotFoundError:
            return False

    def _refused(self, error: OSError) -> ResourceError:
        return ResourceError(f"cannot write {shown(str(self.path))} ({error.strerror}): {self._way_out}")


def _locked(file: FileIO) -> bool:
    """Lock a file until it is closed; whether another process, or opening of it, has not done so before."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


class JoinedReader:
    """Stretches of several files, read by position as if they were one file, one stretch behind the other."""

    def __init__(self, stretches: Sequence[tuple[PositionReader, int, int]]) -> None:
        """`stretches`: of each a file, its first byte there, and how many bytes it has."""
        self._stretches = stretches
        self._starts = [0, *accumulate(size for _, _, size in stretches)]

    def __deepcopy__(self, memo: dict[int, Any]) -> JoinedReader:
        """Itself: it does not change."""
        return self

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """See `PositionReader`; what lies behind the last stretch is an IndexError."""
        done = 0
        for file, at, size in self._within(start, out.size):
            file.read_into(at, out[done : done + size])
            done += size

    def prefetch(self, start: int, size: int) -> None:
        """See `PositionReader`."""
        for file, at, count in self._within(start, size):
            file.prefetch(at, count)

    def check(self) -> None:
        """See `PositionReader`."""
        for file in {id(file): file for file, _, _ in self._stretches}.values():
            file.check()

    def _within(self, start: int, size: int) -> Iterator[tuple[PositionReader, int, int]]:
        """The stretches, or parts of them, that some bytes lie in."""
        while size:
            number = bisect_right(self._starts, start) - 1
            file, first, _ = self._stretches[number]
            count = min(size, self._starts[number + 1] - start)
            yield file, first + start - self._starts[number], count
            start, size = start + count, size - count
