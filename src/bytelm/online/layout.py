"""Where everything lies in a memory's one arena of bytes, how large it is, and how it begins.

A header of int64 says where the parts are, and what the settings were; the kernel reads it (native/online_state.h).
Parts begin at multiples of 64 bytes. All numbers are little-endian.

    slots       64 bytes a context and half byte: its check (16 bits), priority, and 15 nodes of a probability
                (16 bits), a count and a bit history
    ring        the last bytes read
    index       of each match model, positions by a hash of the bytes before
    weights     int32 [2, rows, inputs], 2^20 is 1: without a network, beside one
    finals      int32 [2, 256, 8], 2^20 is 1: of the second layer, by the bits so far
    histories   uint32 [contexts, 256]: 22 bits of probability and ten of a count, by bit history
    hits        uint32 [matches, 256]: the same, that what a match model expects comes
    maps        uint32 [2, rows, 32], 22 bits: adaptive maps, of the network's probability and of the mixer's
    own         what predictors keep of their own
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bytelm.online import tables
from bytelm.online.settings import CONTEXTS, MATCHES, Settings

MAGIC, VERSION = int.from_bytes(b"bytelmON", "little"), 1
SLOT, CELLS = 64, 32
SETS, MATCHED, HITS, CONFIDENCES, PAIRS = 8, 5, 8, 12, 2048
ROWS = (1, 256, 256, CONFIDENCES * 8, HITS * MATCHED, MATCHED * CONFIDENCES, 256, PAIRS)  # of weights, in each set
FIRST = tuple(sum(ROWS[:n]) for n in range(SETS))
ALL_ROWS = sum(ROWS)
STEP = 128  # between cells of an adaptive map, in steps of a nat
EDGE = STEP * (CELLS - 1) // 2
NETWORK_INPUTS = 4  # its own logit, and that after each of three maps
ONE = 1 << 20  # the weight 1

FIXED = (
    "magic",
    "version",
    "size",
    "contexts",
    "matches",
    "inputs",
    "slot_mask",
    "ring_mask",
    "index_mask",
    "row_bits",
)
PARTS = ("slots", "ring", "index", "weights", "finals", "histories", "hits", "network_maps", "last_maps")
PREDICTORS = 8 * len(FIXED + PARTS)  # where the header lists them, four numbers each
SETTINGS = PREDICTORS + 32 * (CONTEXTS + MATCHES)
CHANGING = SETTINGS + 1024  # position, recent, steps [2], met
HEADER = -(-(CHANGING + 5 * 8) // 64) * 64


@dataclass(frozen=True)
class Layout:
    """Sizes and places, from the settings alone."""

    settings: Settings

    @cached_property
    def contexts(self) -> int:
        """How many predictors look a context up."""
        return len(self.settings.contexts)

    @cached_property
    def matches(self) -> int:
        """How many match models there are."""
        return len(self.settings.matches)

    @cached_property
    def inputs(self) -> int:
        """Inputs of the mixer, filled up to a multiple of 16: vectors of every processor are whole."""
        return -(-(2 * (self.contexts + self.matches) + NETWORK_INPUTS + 1) // 16) * 16

    @cached_property
    def slots(self) -> int:
        """Half of the memory."""
        return 1 << (self.settings.memory // (2 * SLOT)).bit_length() - 1

    @cached_property
    def row_bits(self) -> int:
        """Of the larger adaptive maps."""
        return min(16, self.slots.bit_length() - 5)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of each part."""
        rows = MATCHED * 256 + 2 * (1 << self.row_bits)
        return {
            "slots": SLOT * self.slots,
            "ring": 16 * self.slots,
            "index": 8 * self.slots * self.matches,
            "weights": 2 * ALL_ROWS * self.inputs * 4,
            "finals": 2 * 256 * 8 * 4,
            "histories": self.contexts * 1024,
            "hits": max(1, self.matches) * 1024,
            "network_maps": rows * CELLS * 4,
            "last_maps": rows * CELLS * 4,
        }

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each part begins."""
        found, at = {}, HEADER
        for name, size in self.sizes.items():
            found[name] = at
            at += -(-size // 64) * 64
        return found

    @property
    def zeros(self) -> slice:
        """Slots, ring and index, which are nearly all of the arena: zeros until a byte is read."""
        return slice(self.places["slots"], self.places["weights"])

    @cached_property
    def own(self) -> list[tuple[int, int, int, int]]:
        """Of each predictor: its code, parameter, where its own state begins, and its bytes."""
        found: list[tuple[int, int, int, int]] = []
        at = max(place + self.sizes[name] for name, place in self.places.items())
        for named in self.settings.contexts + self.settings.matches:
            at = -(-at // 64) * 64
            found.append((named.module.CODE, named.parameter, at, named.module.BYTES))
            at += named.module.BYTES
        return found

    @cached_property
    def size(self) -> int:
        """The bytes of the arena."""
        _, _, at, own = self.own[-1]
        return -(-(at + own) // 64) * 64

    @cached_property
    def header(self) -> NDArray[np.uint8]:
        """What the arena begins with, and does not change."""
        fixed = [MAGIC, VERSION, self.size, self.contexts, self.matches, self.inputs]
        fixed += [self.slots - 1, self.sizes["ring"] - 1, 2 * self.slots - 1, self.row_bits, *self.places.values()]
        own = np.zeros((CONTEXTS + MATCHES, 4), np.int64)
        own[: len(self.own)] = self.own
        told = f"{self.settings.memory} {','.join(self.settings.predictors)}".encode()
        return np.frombuffer(np.array(fixed, np.int64).tobytes() + own.tobytes() + told.ljust(1024, b"\0"), np.uint8)

    def view(self, arena: NDArray[np.uint8], name: str, dtype: type[np.generic], *shape: int) -> NDArray[np.generic]:
        """A part of the arena as an array."""
        at = self.places[name]
        return arena[at : at + self.sizes[name]].view(dtype).reshape(shape or -1)

    def begin(self, arena: NDArray[np.uint8]) -> None:
        """Write what a memory that has read nothing holds, to an arena of zeros."""
        arena[: len(self.header)] = self.header
        weights = self.view(arena, "weights", np.int32, 2, ALL_ROWS, self.inputs)
        looked_up = 2 * self.contexts
        weights[0, :, :looked_up:2] = round(0.16 * ONE)  # histories; what is counted directly begins at 0
        weights[0, :, looked_up : looked_up + 2 * self.matches : 2] = round(0.2 * ONE)
        self.view(arena, "finals", np.int32, 2, 256, 8)[0, :, :SETS] = rounded_share(SETS)
        self.view(arena, "histories", np.uint32, self.contexts, 256)[:] = tables.expected()
        if self.matches:
            self.view(arena, "hits", np.uint32, self.matches, 256)[:] = np.repeat(
                [tables.rounded((2 * n + 3) << tables.BITS, 2 * n + 5) << 10 for n in range(64)], 4
            )
        cells = tables.squash()[np.arange(CELLS) * STEP - EDGE + tables.WIDE]
        for name in ("network_maps", "last_maps"):
            self.view(arena, name, np.uint32, -1, CELLS)[:] = cells


def rounded_share(count: int) -> int:
    """1 / count, as a weight."""
    return tables.rounded(ONE, count)
