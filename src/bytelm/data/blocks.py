"""Blocks of files elsewhere, kept on this machine's disk up to a bound: shards may be larger than the disk.

FOLDER/held                  the lock of all processes, and how many bytes are held
FOLDER/blocks/ab/HASH        a block, named by the file, its mark, the block's size and its number
FOLDER/tables/SHA256.npy     tables of documents, which do not count

A block is written aside and renamed, so that there is never half of one. What was read longest ago goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.data import places
from bytelm.data.files import PIECE, sha256_of, shown
from bytelm.errors import ConfigError, DataError, ResourceError

FOLDER, BOUND = "BYTELM_CACHE_FOLDER", "BYTELM_CACHE_GB"  # variables of the environment
DEFAULT_GB = 16.0
BLOCK = 1 << 20  # bytes, where all of a corpus can be held: every byte comes once
SMALL = 1 << 16  # bytes, where it cannot: a block may be gone before more than one window of it was read
_AT_ONCE = 16 << 20  # bytes of missing blocks that follow each other, which are asked for together


class Cache:
    """A folder of blocks, which any number of processes and threads of one machine use at the same time."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Hold at most `limit` bytes in `folder`, besides the blocks that are in the making."""
        self.folder, self.limit = folder, limit

    def read(self, name: str, size: int, start: int, out: NDArray[np.uint8]) -> bool:
        """Fill `out` from `start` of a block of `size` bytes; False where it is not held."""
        try:
            with self._path(name).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != size:
                    return False
                file.seek(start)
                if file.readinto(out.data) != len(out):
                    return False
            os.utime(self._path(name))
        except FileNotFoundError:  # never held, or removed meanwhile
            return False
        except OSError as error:
            raise self._refused(error) from error
        return True

    def write(self, name: str, data: bytes) -> None:
        """Hold a block. Raises ResourceError where the disk refuses."""
        if len(data) > self.limit:
            return
        path = self._path(name)
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            with self._counted() as held:
                held[0] += len(data)
                if held[0] > self.limit:
                    held[0] = len(data) + self._remove(self.limit * 9 // 10 - len(data))
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else after a power loss there may be the name without the bytes
            aside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise self._refused(error) from error

    def table(self, url: str, sha256: str) -> Path:
        """A file elsewhere that is held whole, fetched once. Raises DataError where it has not that SHA-256."""
        path = self.folder / "tables" / f"{sha256}.npy"
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            if path.exists() and sha256_of(path) == sha256:
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with places.opened(url, places.status(url)) as stream, aside.open("wb") as file:
                while piece := stream.read(PIECE):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if sha256_of(aside) != sha256:
                raise DataError(f"{places.named(url)} is not what was written (its SHA-256 differs): upload it again")
            aside.replace(path)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        return path

    def _path(self, name: str) -> Path:
        return self.folder / "blocks" / name[:2] / name

    @contextlib.contextmanager
    def _counted(self) -> Generator[list[int]]:
        """How many bytes are held, for this process alone to change. What a killed process promised counts as held."""
        try:
            import fcntl  # not on Windows, where this module must still import
        except ImportError as error:
            raise ResourceError("blocks cannot be shared: this system has no fcntl; use Linux, macOS or WSL") from error
        with open(self.folder / "held", "a+b") as file:  # noqa: PTH123
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            held = [int(text) if text.isdigit() else self.limit]  # which has them counted
            yield held
            file.truncate(0)
            file.write(str(held[0]).encode())

    def _remove(self, target: int) -> int:
        """Remove what was read longest ago until at most `target` bytes are left; how many are."""
        found: list[tuple[int, int, str]] = []
        for folder in (self.folder / "blocks").iterdir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= max(target, 0):
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            left -= size
        return left

    def _refused(self, error: OSError) -> ResourceError:
        where = shown(str(self.folder))
        return ResourceError(
            f"cannot keep data in {where} ({error.strerror}): make room, or set {FOLDER} to another folder or {BOUND} "
            "to less"
        )


def cache() -> Cache:
    """The cache that the environment names. Raises ConfigError for a bound that is none."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get(FOLDER) or home / "bytelm")
    text = os.environ.get(BOUND) or str(DEFAULT_GB)
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ConfigError(f"{BOUND}={text}: must be a number of gigabytes, 0 or more")
    return Cache(folder, limit)


class BlockReader:
    """A file elsewhere that is read by position, through the cache. Threads and forked processes may share it."""

    def __init__(self, url: str, known: places.Status, cache: Cache, block: int) -> None:
        """Read the file that had this status; another one is an error. `block` is in bytes."""
        self._url, self._known, self._cache, self._block = url, known, cache, block

    def read_into(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` (contiguous) with the bytes from `start`. Raises DataError where the file was replaced."""
        end, block = start + len(out), self._block
        missing: list[int] = []
        for number in range(start // block, -(-end // block)):
            first, last = max(start, number * block), min(end, (number + 1) * block)
            size = min(block, self._known.st_size - number * block)
            held = self._cache.read(self._name(number), size, first - number * block, out[first - start : last - start])
            if missing and (held or len(missing) * block >= _AT_ONCE):
                self._fetch(missing, start, out)
                missing = []
            if not held:
                missing.append(number)
        if missing:
            self._fetch(missing, start, out)

    def _fetch(self, numbers: list[int], start: int, out: NDArray[np.uint8]) -> None:
        """Get blocks that follow each other, and fill what of `out`, which begins at `start`, is in them."""
        block, begin = self._block, numbers[0] * self._block
        data = places.read(self._url, begin, min((numbers[-1] + 1) * block, self._known.st_size) - begin)
        places.check_unchanged(self._url, self._known)  # after the reading: what came is of the file that there was
        for number in numbers:
            self._cache.write(self._name(number), data[number * block - begin : (number + 1) * block - begin])
        first, last = max(start, begin), min(start + len(out), begin + len(data))
        out[first - start : last - start] = np.frombuffer(data, np.uint8)[first - begin : last - begin]

    def _name(self, number: int) -> str:
        identity = f"{self._url}\0{self._known.st_size}\0{self._known.mark}\0{self._block}\0{number}"
        return hashlib.sha256(identity.encode()).hexdigest()[:40]
