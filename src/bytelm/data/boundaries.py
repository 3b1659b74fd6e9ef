"""Recorded patch boundaries: one bit per byte of the corpus, computed once, with random access."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.files import PositionReader, sha256_of, shown, sync_folder, write_whole
from bytelm.errors import DataError, ResourceError

_PIECE = struct.Struct("<qq")  # before the bits of some documents: their patches, their bytes


def _stem(directory: Path, fingerprint: str) -> Path:
    return directory / f"boundaries-{fingerprint[:16]}"


@dataclass(frozen=True)
class _Header:
    fingerprint: str
    bytes: int
    patches: int
    sha256: str


class BoundaryWriter:
    """Records boundaries, in the order of the corpus: of one document after another, or of pieces that are done."""

    def __init__(self, directory: str | Path, fingerprint: str, total_bytes: int) -> None:
        """Record `total_bytes` decisions; `fingerprint` (hex, 16 digits or more) names who decides, and about what."""
        self._stem = _stem(Path(directory), fingerprint)
        self._fingerprint, self._total = fingerprint, total_bytes
        self._aside = self._stem.with_suffix(f".bits.{secrets.token_hex(8)}.tmp")  # two may be at it
        self._file = self._aside.open("wb")
        self._begun = np.zeros(0, bool)  # decisions that do not fill a byte yet
        self.position = 0  # the byte of the corpus whose document is to be written next
        self.patches = 0

    def write(self, boundaries: NDArray[np.bool_]) -> None:
        """Record the next document, bool `[bytes]`: whether the byte after each of its bytes opens a patch.

        The decision at the last byte is recorded too, but makes no patch: no byte of the document follows it.
        """
        self.add(boundaries, 1 + int(np.count_nonzero(boundaries[:-1])))

    def add(self, boundaries: NDArray[np.bool_], patches: int) -> None:
        """Record any number of documents that have so many patches together."""
        if self.position + len(boundaries) > self._total:
            raise ValueError(f"boundaries of {self.position + len(boundaries)} bytes for {self._total}")
        held = np.concatenate([self._begun, boundaries])
        whole = len(held) // 8 * 8
        self._begun = held[whole:]
        self.position += len(boundaries)
        self.patches += patches
        try:
            self._file.write(np.packbits(held[:whole]).tobytes())
        except OSError as error:
            raise self._refused(error) from error

    def finish(self) -> Boundaries:
        """Name the record as complete and open it. Raises ValueError when bytes are still missing."""
        if self.position != self._total:
            raise ValueError(f"boundaries of {self.position} bytes only, of {self._total}")
        try:
            self._file.write(np.packbits(self._begun).tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            header = _Header(self._fingerprint, self._total, self.patches, sha256_of(self._aside))
            self._aside.replace(self._stem.with_suffix(".bits"))
            sync_folder(self._stem.parent)
        except OSError as error:
            raise self._refused(error) from error
        write_whole(self._stem.with_suffix(".json"), json.dumps(dataclasses.asdict(header)).encode())
        return Boundaries.open(self._stem.parent, self._fingerprint)

    def _refused(self, error: OSError) -> ResourceError:
        name = shown(str(self._stem.with_suffix(".bits")))
        return ResourceError(f"cannot record boundaries in {name} ({error.strerror}): free some space")

    def __enter__(self) -> BoundaryWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
            self._aside.unlink(missing_ok=True)


def save_piece(path: Path, documents: Iterable[NDArray[np.bool_]], done: Callable[[int], None]) -> None:
    """Record some documents on their own: their patches, their bytes, and a bit for each byte. It lasts."""
    held = [np.zeros(0, bool)]
    patches = size = 0
    for boundaries in documents:
        held.append(boundaries)
        patches += 1 + int(np.count_nonzero(boundaries[:-1]))
        size += len(boundaries)
        done(size)
    with path.open("wb") as file:
        file.write(_PIECE.pack(patches, size) + np.packbits(np.concatenate(held)).tobytes())
        file.flush()
        os.fsync(file.fileno())


def load_piece(path: Path) -> tuple[NDArray[np.bool_], int]:
    """The decisions of some documents, and their patches."""
    data = path.read_bytes()
    patches, size = _PIECE.unpack_from(data)
    return np.unpackbits(np.frombuffer(data, np.uint8, offset=_PIECE.size), count=size).astype(bool), patches


class Boundaries:
    """Recorded boundaries of a whole corpus, left on disk."""

    def __init__(self, path: Path, header: _Header) -> None:
        """Use `Boundaries.open`, which reads and checks the header."""
        self.total = header.bytes
        self.patches = header.patches  # of all documents together
        self._path = path
        self._sha256 = header.sha256
        self._reader = PositionReader(path, (header.bytes + 7) // 8)

    @classmethod
    def open(cls, directory: str | Path, fingerprint: str) -> Boundaries:
        """Open a finished record. Raises DataError when there is none with this fingerprint."""
        path = _stem(Path(directory), fingerprint).with_suffix(".bits")
        found, has = cls.of(path)
        if has != fingerprint:
            name = shown(str(path.with_suffix(".json")))
            raise DataError(f"{name} holds the boundaries of {has}, not of {fingerprint}: record them")
        return found

    @classmethod
    def of(cls, path: Path) -> tuple[Boundaries, str]:
        """The finished record in a .bits file, and whose boundaries they are. Raises DataError."""
        name = shown(str(path.with_suffix(".json")))
        try:
            fields: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
            header = _Header(**fields)
        except FileNotFoundError as error:
            raise DataError(f"no boundaries were recorded as {name}: record them first") from error
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{name} is damaged ({error}): delete it and record the boundaries again") from error
        return cls(path, header), header.fingerprint

    def read(self, start: int, count: int) -> NDArray[np.bool_]:
        """The decisions at `count` bytes from position `start` of the corpus, bool `[count]`."""
        if not 0 <= start <= start + count <= self.total:
            raise ValueError(f"boundaries {start} to {start + count} were asked for of {self.total}")
        first = start // 8
        packed = np.empty((start + count + 7) // 8 - first, np.uint8)
        self._reader.read_into(first, packed)
        skipped = start - 8 * first
        return np.unpackbits(packed)[skipped : skipped + count].astype(bool)

    def verify(self) -> None:
        """Read everything and compare the checksum. Raises DataError naming the file when it differs."""
        if sha256_of(self._path) != self._sha256:
            name = shown(str(self._path))
            raise DataError(f"{name} is not what was written (its SHA-256 differs): record the boundaries again")
