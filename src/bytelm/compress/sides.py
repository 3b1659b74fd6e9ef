"""What codes the bytes of streams: by a model alone, or with a memory of each stream; as writer, or as reader.

    code(logits, streams, symbols) -> symbols      the writer's are coded, the reader's found
    check()                                      16 bits of all that was predicted, coded too: the reader compares them

All state of a side can be taken and put back, so that long work may be interrupted.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.compress.coder import Decoder, Encoder, Frequencies, frequencies
from bytelm.errors import DataError
from bytelm.interfaces.decoder import Ints, Reals
from bytelm.online import coding
from bytelm.online.memory import Memory, among_bytes, check_room

Symbols = NDArray[np.uint8]
EVEN: Frequencies = np.ones((2, 256), np.int64)  # of the two bytes of a check
OTHERWISE = (
    "decompression does not restore the input: it is damaged, or was compressed by another version of bytelm or on a "
    "machine that rounds the model's predictions otherwise: get a complete copy, or decompress it there"
)


@dataclass
class State:
    """A side at one place: plain numbers, and arrays of bytes by name."""

    numbers: dict[str, int] = field(default_factory=dict[str, int])
    arrays: dict[str, Symbols] = field(default_factory=dict[str, Symbols])


@runtime_checkable
class Side(Protocol):
    """A writer or a reader."""

    sum: int
    """Checksum of all that was predicted."""

    def code(self, logits: Reals, streams: Ints, symbols: Symbols) -> Symbols:
        """Code bytes `[n]` of some streams by their logits `[n, BYTES]`, one after another; what they are."""
        ...

    def check(self) -> None:
        """Code, or compare, what tells at once that the other side predicts something else. Raises DataError."""
        ...

    def state(self) -> State:
        """Everything that it needs to go on."""
        ...

    def restore(self, state: State) -> None:
        """Be as it was."""
        ...


class ModelWriter:
    """Codes by a model alone: the bytes of all streams by one coder."""

    def __init__(self) -> None:
        self.encoder, self.sum = Encoder(), 0

    def code(self, logits: Reals, streams: Ints, symbols: Symbols) -> Symbols:
        """See Side."""
        chances = frequencies(logits)
        self.sum = zlib.crc32(chances.data, self.sum)
        self.encoder.put(chances, symbols)
        return symbols

    def check(self) -> None:
        """See Side."""
        self.encoder.put(EVEN, np.array([self.sum >> 8 & 255, self.sum & 255]))

    def end(self) -> list[bytes]:
        """The coded bytes of all streams together."""
        return [self.encoder.end()]

    def state(self) -> State:
        """See Side."""
        numbers = {"low": self.encoder.low, "range": self.encoder.range, "sum": self.sum}
        return State(numbers, {"coded": np.frombuffer(bytes(self.encoder.bytes), np.uint8)})

    def restore(self, state: State) -> None:
        """See Side."""
        self.encoder.low, self.encoder.range, self.sum = (state.numbers[name] for name in ("low", "range", "sum"))
        self.encoder.bytes = bytearray(state.arrays["coded"].tobytes())


class ModelReader:
    """Reads what ModelWriter wrote."""

    def __init__(self, coded: bytes) -> None:
        self.decoder, self.sum = Decoder(coded), 0

    def code(self, logits: Reals, streams: Ints, symbols: Symbols) -> Symbols:
        """See Side."""
        chances = frequencies(logits)
        self.sum = zlib.crc32(chances.data, self.sum)
        return np.array([self.decoder.get(line) for line in chances], np.uint8)

    def check(self) -> None:
        """See Side."""
        first, second = (self.decoder.get(line) for line in EVEN)
        if (first << 8 | second) != self.sum & 0xFFFF:
            raise DataError(OTHERWISE)

    def state(self) -> State:
        """See Side."""
        decoder = self.decoder
        return State({"code": decoder.code, "range": decoder.range, "read": decoder.read, "sum": self.sum})

    def restore(self, state: State) -> None:
        """See Side."""
        decoder, numbers = self.decoder, state.numbers
        decoder.code, decoder.range, decoder.read = numbers["code"], numbers["range"], numbers["read"]
        self.sum = numbers["sum"]


class _Memories:
    """One memory and one coder for each stream, whose coded bytes are its own."""

    def __init__(self, memory: Memory, coders: Sequence[coding.Encoder | coding.Decoder]) -> None:
        check_room((len(coders) - 1) * memory.bytes)
        self.memories = [memory, *(memory.clone() for _ in coders[1:])]
        self.coders, self.sum = coders, 0

    def predicted(self, logits: Reals) -> NDArray[np.float32]:
        found = among_bytes(logits)
        self.sum = zlib.crc32(found.data, self.sum)
        return found

    def state(self) -> State:
        """See Side."""
        arrays: dict[str, Any] = {}
        for stream, (memory, coder) in enumerate(zip(self.memories, self.coders, strict=True)):
            arrays |= {f"{stream}.{name}": array for name, array in coder.state().items()}
            arrays[f"{stream}.memory"] = memory.state
        return State({"sum": self.sum}, arrays)

    def restore(self, state: State) -> None:
        """See Side."""
        self.sum = state.numbers["sum"]
        for stream, (memory, coder) in enumerate(zip(self.memories, self.coders, strict=True)):
            coder.restore(named(state.arrays, f"{stream}."))
            memory.state[:] = state.arrays[f"{stream}.memory"]


class MemoryWriter(_Memories):
    """Codes by a model and the memory of each stream, bit by bit."""

    coders: list[coding.Encoder]

    def __init__(self, memory: Memory, streams: int) -> None:
        super().__init__(memory, [coding.Encoder() for _ in range(streams)])

    def code(self, logits: Reals, streams: Ints, symbols: Symbols) -> Symbols:
        """See Side."""
        predicted = self.predicted(logits)
        for stream in np.unique(streams).tolist():
            mine = streams == stream
            self.coders[stream].put(self.memories[stream], symbols[mine], predicted[mine])
        return symbols

    def check(self) -> None:
        """See Side."""
        self.coders[0].put_even(self.sum & 0xFFFF, 16)

    def end(self) -> list[bytes]:
        """The coded bytes of each stream."""
        return [coder.end() for coder in self.coders]


class MemoryReader(_Memories):
    """Reads what MemoryWriter wrote."""

    coders: list[coding.Decoder]

    def __init__(self, memory: Memory, parts: Sequence[bytes]) -> None:
        super().__init__(memory, [coding.Decoder(part) for part in parts])

    def code(self, logits: Reals, streams: Ints, symbols: Symbols) -> Symbols:
        """See Side."""
        pairs = zip(streams.tolist(), self.predicted(logits), strict=True)
        return np.array([self.coders[stream].get(self.memories[stream], line) for stream, line in pairs], np.uint8)

    def check(self) -> None:
        """See Side."""
        if self.coders[0].get_even(16) != self.sum & 0xFFFF:
            raise DataError(OTHERWISE)


def named(arrays: Mapping[str, Symbols], prefix: str) -> dict[str, Symbols]:
    """Those whose name has a prefix, by the rest of it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
