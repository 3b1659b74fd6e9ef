"""The arena as the definition reads and writes it: plain numbers in, plain numbers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bytelm.online.layout import CHANGING, Layout

K1, K2, MASK = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, (1 << 64) - 1


def in_word(byte: int) -> bool:
    """Whether a byte belongs to a word."""
    return byte >= 128 or byte == 95 or 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122


def mixed(h: int) -> int:
    """64 bits, each of which hangs on all."""
    h = (h ^ h >> 29) * K2 & MASK
    return h ^ h >> 32


class Arena:
    """A memory's bytes, and what its header says."""

    def __init__(self, layout: Layout, data: NDArray[np.uint8]) -> None:
        self.layout, self.data = layout, data
        self.ring = layout.places["ring"]
        self.ring_mask = layout.sizes["ring"] - 1
        self.changing = data[CHANGING : CHANGING + 40].view(np.uint64)  # see layout.py

    @property
    def position(self) -> int:
        """How many bytes were read."""
        return int(self.changing[0])

    def byte(self, position: int) -> int:
        """One of the last bytes."""
        return int(self.data[self.ring + (position & self.ring_mask)])

    def last(self, count: int) -> int:
        """Up to eight last bytes, the newest lowest; zeros before the first."""
        return int(self.changing[1]) & ((1 << 8 * count) - 1)

    def number(self, at: int) -> int:
        """64 bits without a sign."""
        return int(self.data[at : at + 8].view(np.uint64)[0])

    def set_number(self, at: int, value: int) -> None:
        """The same, written."""
        self.data[at : at + 8].view(np.uint64)[0] = value

    def half(self, at: int) -> int:
        """16 bits without a sign."""
        return int(self.data[at : at + 2].view(np.uint16)[0])

    def set_half(self, at: int, value: int) -> None:
        """The same, written."""
        self.data[at : at + 2].view(np.uint16)[0] = value
