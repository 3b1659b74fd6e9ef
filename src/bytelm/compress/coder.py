"""An arithmetic coder: symbols of known frequencies to bytes and back, within one byte of the entropy bound.

The encoder narrows [low, low + range) to the part of each symbol, in 64 bits, and gives away the upper byte whenever
the range has become small; a carry runs back over the bytes that were given. (Martin, 1979; Schindler's form.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.errors import DataError
from bytelm.native import logits as kernels

TOTAL = 1 << 32  # what the frequencies of a symbol sum to at the most
_FULL, _BYTE, _SMALL = 1 << 64, 56, 1 << 56

Frequencies = NDArray[np.int64]
"""`[..., symbols]`, each at least 1, TOTAL together at the most"""


def frequencies(logits: NDArray[np.float32] | NDArray[np.float64]) -> Frequencies:
    """The frequencies of symbols with such logits `[..., symbols]`: every one can be coded, however unlikely it is.

    Those of a line are bitwise identical alone and among others: numbers of one line are summed in one order. By
    kernels they are identical on every processor with the same `native.library.arithmetic`; numpy's are this machine's.
    """
    found = kernels.frequencies(logits, TOTAL)
    if found is not None:
        return found
    chance = logits.astype(np.float64)
    chance -= chance.max(-1, keepdims=True)
    np.exp(chance, out=chance)
    chance *= (TOTAL - chance.shape[-1]) / chance.sum(-1, keepdims=True)
    return chance.astype(np.int64) + 1


class Encoder:
    """Symbols in, bytes out."""

    def __init__(self) -> None:
        self.low, self.range, self.bytes = 0, _FULL, bytearray()

    def put(self, frequency: Frequencies, symbols: NDArray[np.integer[Any]]) -> None:
        """Code symbols `[n]` one after another, by the frequencies `[n, symbols]` of each."""
        lines, ends = np.arange(len(symbols)), np.cumsum(frequency, -1)
        sizes, uppers = frequency[lines, symbols], ends[lines, symbols]
        parts = (uppers - sizes).tolist(), sizes.tolist(), ends[:, -1].tolist()
        for before, size, total in zip(*parts, strict=True):
            part = self.range // total
            self.low += part * before
            self.range = part * size
            self._carry()
            while self.range < _SMALL:
                self.bytes.append(self.low >> _BYTE)
                self.low, self.range = (self.low << 8) % _FULL, self.range << 8

    def end(self) -> bytes:
        """All bytes, with the one by which the last symbol is known. They may be followed by nothing but zeros."""
        self.low += _SMALL - 1  # the range is no smaller: it contains a multiple of _SMALL
        self._carry()
        self.bytes.append(self.low >> _BYTE)
        return bytes(self.bytes)

    def _carry(self) -> None:
        if self.low < _FULL:
            return
        self.low -= _FULL
        last = len(self.bytes) - 1
        while self.bytes[last] == 255:
            self.bytes[last] = 0
            last -= 1
        self.bytes[last] += 1


class Decoder:
    """Bytes in, symbols out."""

    def __init__(self, data: bytes) -> None:
        self.data, self.read = data, 8
        self.code = int.from_bytes(data[:8].ljust(8, b"\0"), "big")
        self.range = _FULL

    def get(self, frequency: Frequencies) -> int:
        """The next of `[symbols]`. Raises DataError where there are no more bytes to tell it from."""
        ends = np.cumsum(frequency)
        part = self.range // int(ends[-1])
        place = min(self.code // part, int(ends[-1]) - 1)
        symbol = int(np.searchsorted(ends, place, side="right"))
        self.code -= part * int(ends[symbol] - frequency[symbol])
        self.range = part * int(frequency[symbol])
        while self.range < _SMALL:
            if self.read >= len(self.data) + 7:
                raise DataError("it is truncated: get a complete copy")
            following = self.data[self.read] if self.read < len(self.data) else 0
            self.code, self.range, self.read = self.code << 8 | following, self.range << 8, self.read + 1
        return symbol
