"""Arithmetic coding of bits with the probabilities of a memory, and what holds the coded bytes.

An interval of 32 bits is divided at each bit; its leading bytes, once equal at both ends, are put out (Witten, Neal and
Cleary 1987). Four bytes end it, so that every decision is made of bytes that were written: a stream that is
cut off is noticed, at the latest, at its last byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bytelm.errors import DataError
from bytelm.online.tables import BITS, HALF

if TYPE_CHECKING:
    from bytelm.online.memory import Memory

FULL = (1 << 32) - 1
LAST = 4  # bytes that end a stream


class Coder:
    """The interval: `state` is int64 [4], low, high, what is decoded (within them), and how many bytes passed."""

    def __init__(self) -> None:
        self.state = np.array([0, FULL, 0, 0], np.int64)

    def _narrow(self, one: int, p: int) -> None:
        low, high = map(int, self.state[:2])
        middle = low + ((high - low) * p >> BITS)
        self.state[:2] = (low, middle) if one else (middle + 1, high)

    def _settled(self) -> bool:
        return not int(self.state[0] ^ self.state[1]) >> 24

    def _shift(self) -> None:
        low, high, _, at = map(int, self.state)
        self.state[:2] = low << 8 & FULL, high << 8 & FULL | 255
        self.state[3] = at + 1

    def put(self, one: int, p: int, out: bytearray) -> int:
        """Code a bit whose probability of being 1 is p, in 2^-22."""
        self._narrow(one, p)
        while self._settled():
            out.append(int(self.state[1]) >> 24)
            self._shift()
        return one

    def get(self, p: int, data: NDArray[np.uint8]) -> int:
        """The next bit; -1 where `data` ends before it."""
        low, high, code, _ = map(int, self.state)
        one = int(code <= low + ((high - low) * p >> BITS))
        self._narrow(one, p)
        while self._settled():
            at = int(self.state[3])
            if at >= len(data):
                return -1
            self.state[2] = int(self.state[2]) << 8 & FULL | int(data[at])
            self._shift()
        return one


class Encoder:
    """Codes bytes by what memories predict, in as many calls as one likes."""

    def __init__(self) -> None:
        self._coder, self._done, self._ended = Coder(), bytearray(), False

    def put(self, memory: Memory, data: NDArray[np.uint8] | bytes, logp: NDArray[np.float32] | None = None) -> None:
        """Code bytes `[n]`, which the memory learns. `logp`: [n, 256], as in `Memory.nats`."""
        if self._ended:
            raise DataError("this stream was ended: begin another Encoder")
        self._done += memory.encode(data, logp, self._coder)

    def put_even(self, value: int, bits: int) -> None:
        """Code the lowest `bits` of a number, in as many bits."""
        for bit in reversed(range(bits)):
            self._coder.put(value >> bit & 1, HALF, self._done)

    def state(self) -> dict[str, NDArray[np.uint8]]:
        """Everything that `restore` needs to go on."""
        return {"coder": self._coder.state.view(np.uint8), "coded": np.frombuffer(bytes(self._done), np.uint8)}

    def restore(self, state: Mapping[str, NDArray[np.uint8]]) -> None:
        """Be as it was."""
        self._coder.state[:] = state["coder"].view(np.int64)
        self._done = bytearray(state["coded"].tobytes())

    def end(self) -> bytes:
        """All coded bytes: at most 64 bits above the nats that `Memory.nats` has, and a hundredth of a percent."""
        if not self._ended:
            self._done += int(self._coder.state[0]).to_bytes(LAST, "big")
            self._ended = True
        return bytes(self._done)


class Decoder:
    """Gives back what an Encoder was given, one byte at a time. Raises DataError for a stream that is too short."""

    def __init__(self, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._coder = Coder()
        if len(data) < LAST:
            raise self._short()
        self._coder.state[2:] = int.from_bytes(data[:LAST], "big"), LAST

    def get(self, memory: Memory, logp: NDArray[np.float32] | None = None) -> int:
        """The next byte, which the memory learns, as when it was coded. `logp`: [256]."""
        byte = memory.decode(self._data, logp, self._coder)
        if byte < 0:
            raise self._short()
        return byte

    def get_even(self, bits: int) -> int:
        """The next number of so many bits, as `Encoder.put_even` coded it."""
        value = 0
        for _ in range(bits):
            one = self._coder.get(HALF, self._data)
            if one < 0:
                raise self._short()
            value = value << 1 | one
        return value

    def state(self) -> dict[str, NDArray[np.uint8]]:
        """Everything but the coded bytes that `restore` needs to go on."""
        return {"coder": self._coder.state.view(np.uint8)}

    def restore(self, state: Mapping[str, NDArray[np.uint8]]) -> None:
        """Be as it was."""
        self._coder.state[:] = state["coder"].view(np.int64)

    @property
    def used(self) -> int:
        """How many bytes of the stream belong to what was decoded so far; at the end, all."""
        return int(self._coder.state[3])

    def _short(self) -> DataError:
        return DataError(
            f"coded bytes: {len(self._data)} are too few for what they should hold: the stream was cut off"
        )
