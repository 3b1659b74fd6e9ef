"""A memory that learns byte by byte, beside a network or alone: context models, match models and their mixer.

    memory = Memory()
    nats = memory.nats(data, logp)            the cost of each byte, which it learns; logp: the network's, or None
    memory.probabilities(logp)                of the 256 bytes after what it has read
    memory.update(byte, logp)                 learn one byte

All state is one arena of bytes of a size known before, and all arithmetic is of integers once the network's
log-probabilities are rounded: the same bytes give the same state and probabilities with every processor, compiler and
number of threads, read in pieces or whole. Without compiled kernels (BYTELM_KERNELS=none) the definition in Python
computes the same, some two hundred times slower.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bytelm import machine
from bytelm.data.files import write_whole
from bytelm.errors import CheckpointError, ResourceError, UsageError
from bytelm.native.logits import log_probabilities
from bytelm.online.engine import Logs, distribution, open_engine
from bytelm.online.layout import CHANGING, HEADER, MAGIC, SETTINGS, VERSION, Layout
from bytelm.online.settings import Settings
from bytelm.online.tables import WHOLE
from bytelm.units import BYTES, show_bytes

if TYPE_CHECKING:
    from bytelm.online.coding import Coder

AT_ONCE = 1 << 16  # bytes read by one call of the kernel, whose probabilities are held
PIECE = 1 << 24  # bytes of a file whose checksum is computed at once
AGAIN = "write it again with Memory.save, that of a run with `bytelm prime`"
TRAILER = 64  # bytes after the arena in a file: the checksum


def among_bytes(logits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """A network's natural log-probabilities of the 256 bytes `[lines, 256]`, by logits of which those are the first.

    Those of a line are bitwise identical alone and among others: numbers of one line are summed in one order. By
    kernels they are identical on every processor with the same `native.library.arithmetic`; numpy's are this machine's.
    """
    by_kernels = log_probabilities(logits, BYTES)
    if by_kernels is not None:
        return by_kernels
    found = logits[:, :BYTES].astype(np.float64)
    found -= found.max(-1, keepdims=True)
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    return found.astype(np.float32)


class Memory:
    """What was read, and how it predicts. Not for several threads at once."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Raises ResourceError where there is no room for so much."""
        self.settings = settings or Settings()
        self._layout = Layout(self.settings)
        self._content: _Content | None = None  # what it began with
        self._open(_blank(self._layout.size))
        self._layout.begin(self._arena)

    def _open(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._arena: NDArray[np.uint8] = np.frombuffer(buffer, np.uint8)[: self._layout.size]
        self._engine = open_engine(self._layout, self._arena)
        self._marks = 0

    @property
    def bytes(self) -> int:
        """The size of all its state."""
        return self._layout.size

    @property
    def state(self) -> NDArray[np.uint8]:
        """All of it, to be kept, or to be put in the place of another memory's of the same settings."""
        return self._arena

    @property
    def read_bytes(self) -> int:
        """How many bytes it has read."""
        return int(self._arena[CHANGING : CHANGING + 8].view(np.int64)[0])

    # --- reading and predicting --------------------------------------------------------------------------------------

    def nats(self, data: NDArray[np.uint8] | bytes, logp: Logs = None) -> NDArray[np.float64]:
        """-ln of the probability of each byte `[n]` after all before it; the memory learns them.

        `logp` [n, 256]: the network's natural log-probabilities of the 256 bytes in each place, if there is one.
        """
        given, logs = _checked(data, logp)
        costs = np.empty(len(given))
        for at in range(0, len(given), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            found = self._engine.read(given[part], None if logs is None else logs[part])
            costs[part] = -np.log(found / WHOLE).sum(axis=1)
        return costs

    def learn(self, data: NDArray[np.uint8] | bytes, logp: Logs = None) -> None:
        """Read without measuring. A memory that has learnt without a network may be used beside one."""
        given, logs = _checked(data, logp)
        for at in range(0, len(given), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            self._engine.read(given[part], None if logs is None else logs[part])

    def probabilities(self, logp: Logs = None) -> NDArray[np.float64]:
        """Of the 256 bytes, in the next place; all are above 0 and their sum is 1. `logp`: [256]."""
        return distribution(self._engine.nodes(_row(logp)))

    def log_probabilities(self, logp: Logs = None) -> NDArray[np.float64]:
        """Their natural logarithms."""
        return np.log(self.probabilities(logp))

    def update(self, byte: int, logp: Logs = None) -> None:
        """Learn one byte. `logp`: [256], that of the place where it stands."""
        row = _row(logp)
        self._engine.read(np.array([byte], np.uint8), None if row is None else row[None])

    def encode(self, data: NDArray[np.uint8] | bytes, logp: Logs, coder: Coder) -> bytes:
        """What a coder puts out for bytes, which the memory learns; `Encoder.put` calls it."""
        given, logs = _checked(data, logp)
        pieces: list[bytes] = []
        for at in range(0, len(given), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            pieces.append(self._engine.encode(given[part], None if logs is None else logs[part], coder))
        return b"".join(pieces)

    def decode(self, data: NDArray[np.uint8], logp: Logs, coder: Coder) -> int:
        """The next coded byte, which the memory learns; -1 where `data` ends; `Decoder.get` calls it."""
        return self._engine.decode(data, _row(logp), coder)

    def identity(self) -> bytes:
        """Eight bytes that tell memories apart: a hash of all state, without the zeros of one that has read nothing."""
        zeros = slice(0, 0) if self.read_bytes else self._layout.zeros  # so that a large one is neither read nor filled
        digest = hashlib.sha256(self._arena[: zeros.start].data)
        digest.update(self._arena[zeros.stop :].data)
        return digest.digest()[:8]

    # --- going back --------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """From here `undo` can go back. Marks may be nested; what is written since is kept in memory."""
        self._engine.mark()
        self._marks += 1

    def undo(self) -> None:
        """Everything is as it was at the newest mark, which is gone. Raises UsageError where there is none."""
        self._unmark(True)

    def keep(self) -> None:
        """The newest mark is gone, and what was learnt stays. Raises UsageError where there is none."""
        self._unmark(False)

    def _unmark(self, restore: bool) -> None:
        if not self._marks:
            raise UsageError("memory: no mark to go back to: call mark first")
        self._marks -= 1
        self._engine.unmark(restore)

    def clone(self) -> Memory:
        """Another memory that has read the same, without marks; of a file or an empty one it takes no room at first."""
        if not self.read_bytes:
            return Memory(self.settings)
        other = Memory.__new__(Memory)
        other.settings, other._layout = self.settings, self._layout
        if self._content is not None and self.read_bytes == self._read_before:
            other._begin(self._content)
        else:
            other._content = None
            other._open(_blank(self._layout.size))
            other._arena[:] = self._arena
        return other

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write everything to a file, whole or not at all. Raises ResourceError."""
        checksum = zlib.crc32(self._arena.data).to_bytes(8, "little")
        write_whole(Path(path), self._arena.data, checksum.ljust(TRAILER, b"\0"))

    @classmethod
    def load(cls, path: Path | str, settings: Settings | None = None) -> Memory:
        """What `save` wrote. The file is mapped: pages are copied only when they are written, and it stays as it is.

        Raises CheckpointError for a file that is none, damaged, of another version, or not of these settings.
        """
        path = Path(path)
        try:
            content = _Content(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is empty"
            raise CheckpointError(f"memory {path}: cannot be read ({reason}): {AGAIN}") from error
        made = cls.__new__(cls)
        made._layout = _layout_of(path, np.frombuffer(content.mapped(), np.uint8))
        made.settings = made._layout.settings
        if settings is not None and made.settings != settings:
            raise CheckpointError(
                f"memory {path}: its settings are {made.settings}, not {settings}: load it with its own"
            )
        made._begin(content)
        return made

    def _begin(self, content: _Content) -> None:
        """As a file says, which stays open: clones begin so too."""
        self._content = content
        self._open(content.mapped())
        self._read_before = self.read_bytes


class _Content:
    """A file that memories map, closed with the last of them."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and ValueError for an empty file."""
        self.file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.file)
        self.mapped()

    def mapped(self) -> mmap.mmap:
        """All of it; pages are copied when they are written."""
        return mmap.mmap(self.file, 0, access=mmap.ACCESS_COPY)


def _blank(size: int) -> mmap.mmap:
    """Zeros that take no room until they are written, in large pages where the system has them."""
    check_room(size)
    try:
        buffer = mmap.mmap(-1, size)
    except (OSError, ValueError) as error:
        raise _no_room(size) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return buffer  # a system without them
    return buffer


def check_room(size: int) -> None:
    """Raises ResourceError where memories of so many bytes cannot all be filled, before the system ends the process."""
    main = machine.memory()
    if main.total and size > main.free:
        raise _no_room(size, f", {show_bytes(main.free)} are free")


def _no_room(size: int, free: str = "") -> ResourceError:
    return ResourceError(
        f"no room for {show_bytes(size)} of online memory{free}: free some, or have fewer streams or a smaller memory"
    )


def _layout_of(path: Path, data: NDArray[np.uint8]) -> Layout:
    """The layout of a file's arena, after everything in it was checked. Raises CheckpointError."""
    if len(data) < HEADER + TRAILER or int(data[:8].view(np.int64)[0]) != MAGIC:
        raise CheckpointError(f"memory {path}: it is no memory of bytelm, or cut off at its beginning: {AGAIN}")
    version = int(data[8:16].view(np.int64)[0])
    if version != VERSION:
        raise CheckpointError(f"memory {path}: its version is {version}, and this bytelm reads {VERSION}: {AGAIN}")
    told = data[SETTINGS:CHANGING].tobytes().rstrip(b"\0").decode("ascii", errors="replace")
    size, _, names = told.partition(" ")
    try:
        layout = Layout(Settings(tuple(names.split(",")), int(size)))
    except (UsageError, ValueError) as error:
        raise CheckpointError(f"memory {path}: its settings cannot be used ({error}): {AGAIN}") from error
    if len(data) != layout.size + TRAILER:
        raise CheckpointError(f"memory {path}: {len(data)} bytes in the place of {layout.size + TRAILER}: {AGAIN}")
    checksum = 0
    for at in range(0, layout.size, PIECE):
        checksum = zlib.crc32(data[at : min(at + PIECE, layout.size)].data, checksum)
    same = bool((data[: len(layout.header)] == layout.header).all())
    if not same or data[layout.size :].tobytes() != checksum.to_bytes(8, "little").ljust(TRAILER, b"\0"):
        raise CheckpointError(f"memory {path}: it is damaged, its checksum is not that of its content: {AGAIN}")
    return layout


def _checked(data: NDArray[np.uint8] | bytes, logp: Logs) -> tuple[NDArray[np.uint8], Logs]:
    given = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
    if given.ndim != 1 or given.dtype != np.uint8:
        raise UsageError(f"memory: bytes of shape {given.shape} and type {given.dtype}: give uint8 [n]")
    if logp is None:
        return given, None
    if logp.shape != (len(given), 256):
        raise UsageError(f"memory: log-probabilities of shape {logp.shape}: give [{len(given)}, 256]")
    return given, np.ascontiguousarray(logp, np.float32)


def _row(logp: Logs) -> Logs:
    if logp is None:
        return None
    if logp.shape != (256,):
        raise UsageError(f"memory: log-probabilities of shape {logp.shape}: give [256]")
    return np.ascontiguousarray(logp, np.float32)
