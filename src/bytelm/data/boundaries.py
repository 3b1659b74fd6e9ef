"""Recorded patch boundaries: one bit per byte of the corpus, computed once, with random access."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.files import PositionReader, sha256_of, shown, sync_folder, write_whole
from bytelm.errors import DataError, ResourceError

_FLUSH = 1 << 22  # bytes of the corpus after which what was decided is made to last


def _stem(directory: Path, fingerprint: str) -> Path:
    return directory / f"boundaries-{fingerprint[:16]}"


@dataclass(frozen=True)
class _Progress:
    """What the partial file holds that can be relied on."""

    fingerprint: str
    total: int
    position: int
    patches: int


@dataclass(frozen=True)
class _Header:
    fingerprint: str
    bytes: int
    patches: int
    sha256: str


class BoundaryWriter:
    """Records boundaries document by document, and resumes where an interrupted one stopped.

    Used in a `with` block, it keeps what was written when the block is left early.
    """

    def __init__(self, directory: str | Path, fingerprint: str, total_bytes: int) -> None:
        """Record `total_bytes` decisions; `fingerprint` (hex, 16 digits or more) names who decides, and about what."""
        self._stem = _stem(Path(directory), fingerprint)
        self._partial = self._stem.with_suffix(".partial")
        self._progress_path = self._stem.with_suffix(".partial.json")
        self._progress = _read_progress(self._progress_path, self._partial, fingerprint, total_bytes)
        self.position = self._progress.position  # the byte of the corpus whose document is to be written next
        self.patches = self._progress.patches
        self._held: list[NDArray[np.bool_]] = []
        if self.position == 0:
            write_whole(self._partial, b"")

    def write(self, boundaries: NDArray[np.bool_]) -> None:
        """Record the next document, bool `[bytes]`: whether the byte after each of its bytes opens a patch.

        The decision at the last byte is recorded too, but makes no patch: no byte of the document follows it.
        """
        if self.position + len(boundaries) > self._progress.total:
            raise ValueError(f"boundaries of {self.position + len(boundaries)} bytes for {self._progress.total}")
        self._held.append(np.array(boundaries, bool))
        self.position += len(boundaries)
        self.patches += 1 + int(np.count_nonzero(boundaries[:-1]))
        if self.position - self._progress.position >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Make everything written so far last."""
        if self.position == self._progress.position:
            return
        progress = dataclasses.replace(self._progress, position=self.position, patches=self.patches)
        try:
            self._append()
            write_whole(self._progress_path, json.dumps(dataclasses.asdict(progress)).encode())
        except OSError as error:
            name = shown(str(self._partial))
            raise ResourceError(f"cannot record boundaries in {name} ({error.strerror}): free some space") from error
        self._progress = progress
        self._held = []

    def _append(self) -> None:
        whole, begun = divmod(self._progress.position, 8)
        with self._partial.open("r+b") as file:
            file.seek(whole)
            last = np.frombuffer(file.read(1), np.uint8)  # the byte that the flush before filled in part
            file.seek(whole)
            file.write(np.packbits(np.concatenate([np.unpackbits(last)[:begun].astype(bool), *self._held])).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> Boundaries:
        """Name the record as complete and open it. Raises ValueError when bytes are still missing."""
        progress = self._progress
        if self.position != progress.total:
            raise ValueError(f"boundaries of {self.position} bytes only, of {progress.total}")
        self.flush()
        header = _Header(progress.fingerprint, progress.total, self.patches, sha256_of(self._partial))
        self._partial.replace(self._stem.with_suffix(".bits"))
        sync_folder(self._stem.parent)
        write_whole(self._stem.with_suffix(".json"), json.dumps(dataclasses.asdict(header)).encode())
        self._progress_path.unlink()
        return Boundaries.open(self._stem.parent, progress.fingerprint)

    def __enter__(self) -> BoundaryWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()


def _read_progress(path: Path, partial: Path, fingerprint: str, total: int) -> _Progress:
    """How far an interrupted writer of the same boundaries came; the beginning when there is none to rely on."""
    begin = _Progress(fingerprint, total, 0, 0)
    try:
        progress = _Progress(**json.loads(path.read_bytes()))
        whole = partial.stat().st_size * 8 >= progress.position
    except (OSError, ValueError, TypeError):
        return begin
    return progress if whole and (progress.fingerprint, progress.total) == (fingerprint, total) else begin


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
