"""What computes over an arena: the kernel in C++, or the definition in Python. Both do the same, bit for bit."""

from __future__ import annotations

import ctypes
import weakref
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.native.online import kernel
from bytelm.online import tables
from bytelm.online.coding import Coder
from bytelm.online.definition import Definition
from bytelm.online.layout import Layout
from bytelm.online.tables import WHOLE

Logs = NDArray[np.float32] | None


@runtime_checkable
class Engine(Protocol):
    """Reading, predicting, coding, and going back; arrays are contiguous, and of the right types."""

    def read(self, data: NDArray[np.uint8], logp: Logs) -> NDArray[np.int32]:
        """Learn bytes `[n]`; the probability that each bit had `[n, 8]`, in 2^-22."""
        ...

    def nodes(self, logp: Logs) -> NDArray[np.int32]:
        """The probability of a 1 at each node of the tree of the next byte's bits `[256]`, in 2^-22."""
        ...

    def encode(self, data: NDArray[np.uint8], logp: Logs, coder: Coder) -> bytes:
        """Learn bytes, and code them; what the coder puts out."""
        ...

    def decode(self, data: NDArray[np.uint8], logp: Logs, coder: Coder) -> int:
        """The next byte that was coded, which is learnt; -1 where `data` ends before it, and nothing is learnt."""
        ...

    def mark(self) -> None:
        """Begin to note what is written."""
        ...

    def unmark(self, restore: bool) -> None:
        """End it; with `restore`, what was written since the newest mark is as it was."""
        ...


class Python:
    """The definition. It takes one to two milliseconds a byte, and copies the whole arena at a mark."""

    def __init__(self, layout: Layout, arena: NDArray[np.uint8]) -> None:
        self.definition, self.arena = Definition(layout, arena), arena
        self.copies: list[NDArray[np.uint8]] = []

    def read(self, data: NDArray[np.uint8], logp: Logs) -> NDArray[np.int32]:
        """See Engine."""
        return self.definition.read(data, logp)

    def nodes(self, logp: Logs) -> NDArray[np.int32]:
        """See Engine."""
        return self.definition.nodes(logp)

    def encode(self, data: NDArray[np.uint8], logp: Logs, coder: Coder) -> bytes:
        """See Engine."""
        out = bytearray()
        for i, byte in enumerate(data.tolist()):

            def choose(bit: int, p: int, byte: int = byte) -> int:
                return coder.put(byte >> 7 - bit & 1, p, out)

            self.definition.step(None if logp is None else logp[i], choose)
        return bytes(out)

    def decode(self, data: NDArray[np.uint8], logp: Logs, coder: Coder) -> int:
        """See Engine."""
        before = coder.state.copy()
        byte = self.definition.step(logp, lambda bit, p: coder.get(p, data))
        if byte < 0:
            coder.state[:] = before
        return byte

    def mark(self) -> None:
        """See Engine."""
        self.copies.append(self.arena.copy())

    def unmark(self, restore: bool) -> None:
        """See Engine."""
        old = self.copies.pop()
        if restore:
            self.arena[:] = old


class Kernel:
    """The kernel in C++. Calls release the interpreter's lock."""

    def __init__(self, library: ctypes.CDLL, arena: NDArray[np.uint8]) -> None:
        self.library, self.arena = library, arena
        self.tables = tables.blob()
        self.journal: int = library.bytelm_online_journal()
        weakref.finalize(self, library.bytelm_online_forget, self.journal)
        self.both = (arena.ctypes.data, self.tables.ctypes.data)
        self.all = (*self.both, self.journal)

    def read(self, data: NDArray[np.uint8], logp: Logs) -> NDArray[np.int32]:
        """See Engine."""
        found = np.empty((len(data), 8), np.int32)
        self.library.bytelm_online_read(*self.all, address(data), len(data), address(logp), address(found))
        return found

    def nodes(self, logp: Logs) -> NDArray[np.int32]:
        """See Engine."""
        found = np.zeros(256, np.int32)
        self.library.bytelm_online_nodes(*self.both, address(logp), address(found))
        return found

    def encode(self, data: NDArray[np.uint8], logp: Logs, coder: Coder) -> bytes:
        """See Engine."""
        out = np.empty(24 * len(data) + 8, np.uint8)
        given = (address(data), len(data), address(logp), address(coder.state), address(out))
        return out[: self.library.bytelm_online_encode(*self.all, *given)].tobytes()

    def decode(self, data: NDArray[np.uint8], logp: Logs, coder: Coder) -> int:
        """See Engine."""
        given = (address(data), len(data), address(logp), address(coder.state))
        return self.library.bytelm_online_decode(*self.all, *given)

    def mark(self) -> None:
        """See Engine."""
        self.library.bytelm_online_mark(self.journal)

    def unmark(self, restore: bool) -> None:
        """See Engine."""
        self.library.bytelm_online_unmark(self.journal, self.arena.ctypes.data if restore else None)


def address(array: NDArray[np.generic] | None) -> int | None:
    """Where an array begins; None for none."""
    return None if array is None else array.ctypes.data


def open_engine(layout: Layout, arena: NDArray[np.uint8]) -> Engine:
    """The kernel, where it is compiled, or the definition."""
    library = kernel()
    return Python(layout, arena) if library is None else Kernel(library, arena)


def distribution(nodes: NDArray[np.int32]) -> NDArray[np.float64]:
    """The probabilities of the 256 bytes: along each path of the tree, the product."""
    found = np.ones(1)
    for bit in range(8):
        ones = nodes[1 << bit : 2 << bit]
        found = (found[:, None] * (np.stack([WHOLE - ones, ones], axis=1) / WHOLE)).reshape(-1)
    return found
