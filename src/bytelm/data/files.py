"""Files on disk: atomic writes, random access, and printable names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.errors import DataError, ResourceError

PIECE = 1 << 20  # bytes: the most that is held of a stream at a time
LONGEST = 64 << 20  # bytes of a JSON line or a row; a longer one is a bad one, so that no file can fill the memory


def shown(name: str) -> str:
    """A file name fit for one line of a message: newlines and bytes that are not UTF-8 appear escaped."""
    return name if name.isprintable() else ascii(name)


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` so that at any instant, power loss included, it holds all of `data` or what it held before.

    Raises ResourceError where the disk refuses; nothing half-written is left.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
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

    It is not mapped into memory: a mapped file that gets shorter kills the process, a read one raises DataError.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Open `path`, which must hold exactly `size` bytes. Raises DataError naming it where it does not."""
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # Not __del__: when the interpreter ends it may run after the modules are gone, and prints what it raises.
            # Nor at exit, where threads may still read: the system closes what is left open.
            weakref.finalize(self, os.close, self._descriptor).atexit = False
            found = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise DataError(f"{shown(str(path))} cannot be opened ({error.strerror}): pack the data again") from error
        if found != size:
            raise self._changed(found, size)

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` (contiguous) with the bytes from `start`. Raises DataError where the file has become shorter."""
        view, done = out.data, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            if count == 0:
                raise self._changed(start + done, start + len(view))
            done += count

    def _changed(self, found: int, wanted: int) -> DataError:
        name = shown(str(self._path))
        return DataError(f"{name} changed after it was written, from {wanted} bytes to {found}: pack the data again")
