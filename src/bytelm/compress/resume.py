"""Long work that may be interrupted: its state is saved beside its output, and the same work goes on from it.

The output is the same, bit for bit, whether and wherever it was interrupted.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bytelm.compress.sides import State
from bytelm.data.files import write_whole
from bytelm.errors import CheckpointError

EVERY = 300.0  # seconds between two states of work that may be killed


class Stopped(Exception):
    """The work was asked to stop, and its state is saved: `done` bytes of the file."""

    def __init__(self, done: int) -> None:
        super().__init__(f"saved after {done} bytes")
        self.done = done


class Resume:
    """The state of one piece of work in a file."""

    def __init__(
        self, path: Path, stop: Callable[[], bool] = lambda: False, every: float = EVERY, command: str = ""
    ) -> None:
        """`stop`: whether the work should be interrupted. A state is saved then, and `every` so many seconds.

        `command`: whose work it is.
        """
        self.path, self.stop, self.every, self.command = path, stop, every, command
        self._key, self._saved = "", time.monotonic()
        self.begun = False  # whether `begin` found no state but of this work
        self._remedy = f"delete {path} to start over"

    def found(self) -> bool:
        """Whether there is a state. Raises CheckpointError for one of another command, or none that can be read."""
        return self._read() is not None

    def begin(self, key: str) -> tuple[int, State] | None:
        """The place and the state to go on from; None for a beginning. `key`: what tells this work from others.

        Raises CheckpointError for a state of other work, or a damaged one.
        """
        self._key, self._saved = key, time.monotonic()
        read = self._read()
        if read is None:
            self.begun = True
            return None
        told, arrays = read
        if told.get("key") != key:
            raise CheckpointError(f"{self.path} is of another file, run or option: {self._remedy}, or give those")
        place, numbers = told.get("place", ""), told.get("numbers", "")
        if told.get("checksum") != str(checksum(arrays, place, numbers)):
            raise CheckpointError(f"{self.path} is damaged: {self._remedy}")
        self.begun = True
        return int(place), State(json.loads(numbers), arrays)

    def _read(self) -> tuple[dict[str, str], dict[str, NDArray[np.uint8]]] | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "np") as file:
                told, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} is no state of this work that can be read: {self._remedy}") from error
        command = told.get("command") or self.command
        if command != self.command:
            raise CheckpointError(
                f"{self.path} is of an interrupted `bytelm {command}` with this output: give that command again to "
                f"continue it, or {self._remedy}"
            )
        return told, arrays

    def at(self, place: int, done: int, state: Callable[[], State], settle: Callable[[], None] | None = None) -> None:
        """Save the state at a place where it may be taken up, if it is time. Raises Stopped if that was asked for.

        `settle` is called before: what the work has written by then must last, and what it has read be as it was.
        """
        stop = self.stop()
        if not stop and time.monotonic() - self._saved < self.every:
            return
        if settle is not None:
            settle()
        found = state()
        told = {"place": str(place), "numbers": json.dumps(found.numbers)}
        told |= {"key": self._key, "command": self.command, "checksum": str(checksum(found.arrays, **told))}
        # Not by safetensors' own `save`, which copies all arrays twice: memories have gigabytes.
        parts = (np.ascontiguousarray(array).data for array in found.arrays.values())
        write_whole(self.path, header(found.arrays, told), *parts)
        self._saved = time.monotonic()
        if stop:
            raise Stopped(done)

    def end(self) -> None:
        """The work is done, its output written, and its state of no use."""
        self.path.unlink(missing_ok=True)


def header(arrays: Mapping[str, NDArray[np.uint8]], told: Mapping[str, str]) -> bytes:
    """The head of a safetensors file of arrays of bytes, which follow in their order."""
    entries: dict[str, Any] = {"__metadata__": dict(told)}
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        entries[name] = {"dtype": "U8", "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def checksum(arrays: Mapping[str, NDArray[np.uint8]], place: str, numbers: str) -> int:
    """CRC-32 of a place, of numbers as they are written, and of arrays in the order of their names."""
    found = zlib.crc32(f"{place} {numbers}".encode())
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), found))
    return found
