"""The memory, defined: how it predicts the bits of the next byte, and what a byte teaches it. In plain integers.

native/online_*.h computes the same, about 200 times faster; a test compares every bit and byte of state. The family
is that of PAQ (Mahoney 2005; Knoll and de Freitas 2012, "A machine learning perspective on predictive coding with
PAQ"):

    contexts, matches, network  ->  logits of the next bit  ->  SETS mixers  ->  one mixer  ->  mean with three maps

A logit is ln(p / (1 - p)) in 1/256 nat. A mixer is a row of weights, chosen by what is known, and its output the
weighted sum of all logits, trained on its own coding cost; the outputs are mixed once more. Adaptive maps give back
what came after such a prediction before, in such a context.

All eight predictions of a byte are made from the state before it, and everything is learnt at its end: so the
probabilities of the 256 bytes are a function of one state. Right shifts round towards minus infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bytelm.online import tables
from bytelm.online.arena import K1, K2, MASK, Arena, mixed
from bytelm.online.layout import (
    ALL_ROWS,
    CONFIDENCES,
    EDGE,
    FIRST,
    HITS,
    MATCHED,
    NETWORK_INPUTS,
    ONE,
    PAIRS,
    SETS,
    SLOT,
    STEP,
    Layout,
)
from bytelm.online.predictors import match as matching
from bytelm.online.predictors.match import Match
from bytelm.online.tables import BITS, FINE, LOWEST, NAT, WHOLE, WIDE

BIAS = 77  # the last input, 0.3 nats
BESIDE = 367002  # 0.35, the first weight of a network
KEPT = (7, 10)  # of weights that were learnt without a network, beside one
RATES = 655, 197, 20000  # of the mixers, in 2^-16: the first, the last, and after how many bytes it has halved
FINAL_RATE, MAP_RATE = 65, 1311  # in 2^-16
MOST = {"history": 255, "hit": 250, "direct": 250}  # observations, after which the newest weighs the same


@dataclass
class Bit:
    """What one bit was predicted from, and its probability `p` of being 1, in 2^-22, from 1 to 2^22 - 1."""

    x: NDArray[np.int64]
    rows: list[int]
    dots: list[int]
    total: int
    p: int = 0
    network: int | None = None
    network_rows: list[int] = field(default_factory=list[int])
    last_rows: list[int] = field(default_factory=list[int])
    hits: list[tuple[int, int] | None] = field(default_factory=list["tuple[int, int] | None"])


def tree_of(logp: NDArray[np.float32]) -> list[int]:
    """The network's frequencies of the bytes, at least 1 and at most 2^30 + 1, and their sums over the tree of bits."""
    low = logp.astype(np.float32) * np.float32(-FINE)
    low = np.where(low < LOWEST, low, np.float32(LOWEST))  # so is what is not a number
    q = (np.where(low > 0, low, np.float32(0)) + np.float32(0.5)).astype(np.int64)
    coarse, fine = (table.astype(np.uint64) for table in (tables.falling(4, 128), tables.falling(FINE, 256)))
    leaves = 1 + (coarse[q >> 8] * fine[q & 255] >> np.uint64(32)).astype(np.int64)
    tree = [0] * 256 + leaves.tolist()
    for node in range(255, 0, -1):
        tree[node] = tree[2 * node] + tree[2 * node + 1]
    return tree


def clamp(x: int, low: int, high: int) -> int:
    """The nearest number from low to high."""
    return max(low, min(x, high))


class Definition:
    """A memory over an arena of bytes."""

    def __init__(self, layout: Layout, data: NDArray[np.uint8]) -> None:
        self.layout, self.data = layout, data
        self.arena = Arena(layout, data)
        view = layout.view
        self.slots = view(data, "slots", np.uint8, -1, SLOT)
        self.weights = view(data, "weights", np.int32, 2, ALL_ROWS, layout.inputs)
        self.finals = view(data, "finals", np.int32, 2, 256, 8)
        self.histories = view(data, "histories", np.uint32, layout.contexts, 256)
        self.hits = view(data, "hits", np.uint32, -1, 256)
        self.maps = {name: view(data, f"{name}_maps", np.uint32, -1, 32) for name in ("network", "last")}
        self.squashed, self.stretched = tables.squash().tolist(), tables.stretch().tolist()
        self.mantissas, self.rates = tables.mantissas().tolist(), tables.rates().tolist()
        self.next = tables.histories()[0].tolist()
        self.contexts = list(zip(layout.settings.contexts, layout.own, strict=False))
        self.matches = list(zip(layout.settings.matches, layout.own[layout.contexts :], strict=True))

    # --- functions of numbers ----------------------------------------------------------------------------------------

    def squash(self, x: int) -> int:
        """1 / (1 + e^-x), in 2^-22."""
        return self.squashed[clamp(x, -WIDE, WIDE - 1) + WIDE]

    def stretch(self, p: int) -> int:
        """The logit of a probability."""
        return self.stretched[min(p >> BITS - 12, 4095)]

    def logarithm(self, n: int) -> int:
        """ln n, in 1/1024 nat."""
        bits = n.bit_length() - 1
        top = (n >> bits - 11 if bits > 11 else n << 11 - bits) & 2047
        return (bits * tables.LN2 >> 16) + self.mantissas[top]

    def observed(self, cell: int, one: bool, most: int) -> int:
        """A probability of 22 bits above a count of ten, after one observation more."""
        p, n = cell >> 10, cell & 1023
        p += ((WHOLE - 1 if one else 0) - p) * self.rates[n] >> 16
        return p << 10 | (n + 1 if n < most else n)

    # --- before a byte -----------------------------------------------------------------------------------------------

    def begin(self, logp: NDArray[np.float32] | None) -> None:
        """What is the same for all bits of the next byte: contexts, matches, the network's tree."""
        self.keys = [named.module.context(self.arena, own[2], own[1]) for named, own in self.contexts]
        self.tree = None if logp is None else tree_of(logp)
        self.entries = [matching.entry(self.arena, own[1], i) for i, (_, own) in enumerate(self.matches)]
        self.found: list[Match] = [
            matching.current(self.arena, own[2], own[1], at)
            for (_, own), at in zip(self.matches, self.entries, strict=True)
        ]
        self.expected = [256 | self.arena.byte(m.pointer) if m.pointer else 0 for m in self.found]

    def place(self, number: int, half: int) -> tuple[int, int]:
        """The slot of a context and the first half of a byte (1 before it), or its neighbour; and its check."""
        h = mixed((mixed((self.keys[number] + (number + 1) * K1) & MASK) + half * K2) & MASK)
        return h >> 16 & self.layout.slots - 1, h & 0xFFFF | 1

    def check(self, slot: int) -> int:
        """Whose a slot is; 0: nobody's."""
        return int(self.slots[slot, 0]) | int(self.slots[slot, 1]) << 8

    def slot(self, number: int, half: int) -> int | None:
        """The slot of a context, if it has one."""
        first, check = self.place(number, half)
        return next((slot for slot in (first, first ^ 1) if self.check(slot) == check), None)

    def slots_of(self, half: int) -> list[int | None]:
        """The slots of all contexts."""
        return [self.slot(number, half) for number in range(self.layout.contexts)]

    def map_rows(self, so_far: int, more: int) -> list[int]:
        """Rows of three adaptive maps: by the bits so far (and more), the last byte too, the last two."""
        one, two = self.arena.last(1) << 8 | so_far, self.arena.last(2) << 8 | so_far
        bits, first = self.layout.row_bits, MATCHED * 256
        hashed = (two * K1 & MASK) >> 64 - bits
        return [more * 256 + so_far, first + ((one * 40503 & 0xFFFF) >> 16 - bits), first + (1 << bits) + hashed]

    def read_map(self, which: str, row: int, z: int) -> int:
        """What came after a logit, between two cells."""
        low, share = divmod(clamp(z, -EDGE, EDGE - 1) + EDGE, STEP)
        cells = self.maps[which][row]
        return (int(cells[low]) * (STEP - share) + int(cells[low + 1]) * share) // STEP

    # --- a bit -------------------------------------------------------------------------------------------------------

    def predict(self, bit: int, so_far: int, slots: Sequence[int | None]) -> Bit:
        """The bit number `bit` (0 to 7), where `so_far` is 1 and the bits before it."""
        x: list[int] = []
        seen = 0
        node = so_far if bit < 4 else 1 << bit - 4 | so_far & (1 << bit - 4) - 1
        for number, slot in enumerate(slots):
            low, high, count, history = (0,) * 4 if slot is None else self.slots[slot, 4 * node : 4 * node + 4].tolist()
            direct = self.stretched[(low | high << 8) >> 4] if count else 0
            x += [self.stretch(int(self.histories[number, history]) >> 10) if count else 0, direct]
            named = self.contexts[number][0]
            seen += bool(count) and named.name.startswith("order:") and named.parameter > 0
        hits, matched, byte = self.match_inputs(bit, so_far, x)
        made = Bit(np.zeros(self.layout.inputs, np.int64), [], [], 0, hits=hits)
        confidence = 0
        if self.tree:
            z = self.logarithm(self.tree[2 * so_far + 1]) - self.logarithm(self.tree[2 * so_far])
            made.network = z = clamp((z + 2) >> 2, -WIDE, WIDE - 1)
            made.network_rows = self.map_rows(so_far, 0)
            x += [z, *(self.stretch(self.read_map("network", row, z)) for row in made.network_rows)]
            confidence = min(abs(z) * 3 // (2 * NAT), CONFIDENCES - 1)
        made.x[: len(x)] = x
        made.x[2 * (self.layout.contexts + self.layout.matches) + NETWORK_INPUTS] = BIAS
        made.rows = self.select(so_far, bit, min(seen, HITS - 1), matched, confidence, byte)
        made.dots = [self.dot(row, made.x) for row in made.rows]
        shares = self.finals[int(bool(self.tree and self.met)), so_far, :SETS].tolist()
        total = sum(dot * share for dot, share in zip(made.dots, shares, strict=True))
        made.total = clamp(total + ONE // 2 >> 20, -WIDE, WIDE - 1)
        made.last_rows = self.map_rows(so_far, matched)
        mapped = sum(self.read_map("last", row, made.total) for row in made.last_rows)
        made.p = clamp((3 * self.squash(made.total) + mapped) // 6, 1, WHOLE - 1)
        return made

    def match_inputs(self, bit: int, so_far: int, x: list[int]) -> tuple[list[tuple[int, int] | None], int, int]:
        """Two logits of each match model that expects a bit; its class, that bit; the longest: how long, its byte."""
        hits: list[tuple[int, int] | None] = []
        matched, longest, byte = 0, -1, 0
        for number, (match, expected) in enumerate(zip(self.found, self.expected, strict=True)):
            if expected >> 8 - bit != so_far:
                x += [0, 0]
                hits.append(None)
                continue
            one = expected >> 7 - bit & 1
            p = int(self.hits[number, match.bucket]) >> 10
            both = self.stretch(p), p - WHOLE // 2 >> BITS - 10
            x += both if one else [-z for z in both]
            hits.append((match.bucket, one))
            matched = max(matched, 1 + sum(match.length > n for n in (0, 15, 31)))
            if match.length > longest:
                longest, byte = match.length, expected & 255
        return hits, matched, byte

    def select(self, so_far: int, bit: int, seen: int, matched: int, confidence: int, byte: int) -> list[int]:
        """The row of each set: by nothing; the bits so far; the last byte; the network's confidence and the bit's
        number; how many orders were seen and the match; the match and the network's confidence; the byte
        that the longest match expects; a hash of the last two."""
        by_match = seen * MATCHED + matched, matched * CONFIDENCES + confidence
        pair = self.arena.last(2) * 0x9E3779B1 >> 16 & PAIRS - 1
        chosen = (0, so_far, self.arena.last(1), confidence * 8 + bit, *by_match, byte, pair)
        return [first + row for first, row in zip(FIRST, chosen, strict=True)]

    @property
    def met(self) -> bool:
        """Whether a network was there for a byte: only then are there weights beside one."""
        return bool(self.arena.changing[4])

    def spread(self, row: int) -> NDArray[np.int32]:
        """The first weights of a row beside a network: most of those without one, of which confidence is 0."""
        if FIRST[5] <= row < FIRST[6]:
            row -= (row - FIRST[5]) % CONFIDENCES
        elif FIRST[3] <= row < FIRST[4]:
            row = FIRST[3] + (row - FIRST[3]) % 8
        made = self.weights[0, row].astype(np.int64)
        network = 2 * (self.layout.contexts + self.layout.matches)
        made[:network] = [int(abs(w) * KEPT[0] // KEPT[1] * np.sign(w)) for w in made[:network].tolist()]
        made[network] = BESIDE
        return made.astype(np.int32)

    def dot(self, row: int, x: NDArray[np.int64]) -> int:
        """A mixer's output: modulo 2^32, so 512 nats, which no sum comes near to."""
        beside = self.tree is not None
        w = self.spread(row) if beside and not self.met else self.weights[int(beside), row]
        total = int((w.astype(np.int64) >> 6) @ x) & 0xFFFFFFFF
        total = (total ^ 1 << 31) - (1 << 31) + (1 << 13) & 0xFFFFFFFF
        return clamp((total ^ 1 << 31) - (1 << 31) >> 14, -WIDE, WIDE - 1)

    # --- after a byte ------------------------------------------------------------------------------------------------

    def learn(self, bits: Sequence[Bit], byte: int) -> None:
        """Everything that a byte teaches."""
        beside = int(self.tree is not None)
        if beside and not self.met:
            self.weights[1] = [self.spread(row) for row in range(ALL_ROWS)]
            self.finals[1] = self.finals[0]
            self.arena.changing[4] = 1
        steps = int(self.arena.changing[2 + beside])
        first, least, half = RATES
        rate = max(least, first * half // (half + steps))
        self.arena.changing[2 + beside] = min(steps + 1, 1 << 30)
        so_far = 1
        for number, made in enumerate(bits):
            one = byte >> 7 - number & 1
            self.teach_mixers(made, so_far, bool(one), rate)
            so_far = 2 * so_far + one
        for number in range(self.layout.contexts):
            self.learn_half(self.claim(number, 1), number, byte >> 4)
            self.learn_half(self.claim(number, 16 | byte >> 4), number, byte & 15)
        self.follow(byte)
        for named, own in self.contexts:
            named.module.note(self.arena, own[2], own[1], byte)
        position = self.arena.position
        self.data[self.arena.ring + (position & self.arena.ring_mask)] = byte
        self.arena.changing[1] = self.arena.last(7) << 8 | byte
        self.arena.changing[0] = position + 1

    def teach_mixers(self, made: Bit, so_far: int, one: bool, rate: int) -> None:
        """A step down the gradient of the coding cost, of each mixer and of the last one; and adaptive maps."""
        beside = int(made.network is not None)
        target = WHOLE if one else 0
        for row, dot in zip(made.rows, made.dots, strict=True):
            error = (target - self.squash(dot)) * rate + 32768 >> 16
            self.weights[beside, row] += ((made.x * error + 512) >> 10).astype(np.int32)
        error = (target - self.squash(made.total)) * FINAL_RATE + 32768 >> 16
        for number, dot in enumerate(made.dots):
            self.finals[beside, so_far, number] += (error * dot + 512) >> 10
        for row in made.last_rows:
            self.teach_map("last", row, made.total, one)
        for row in made.network_rows:
            self.teach_map("network", row, made.network or 0, one)
        for number, hit in enumerate(made.hits):
            if hit:
                cell = int(self.hits[number, hit[0]])
                self.hits[number, hit[0]] = self.observed(cell, hit[1] == one, MOST["hit"])

    def teach_map(self, which: str, row: int, z: int, one: bool) -> None:
        """Both cells, by how near they are."""
        low, share = divmod(clamp(z, -EDGE, EDGE - 1) + EDGE, STEP)
        cells = self.maps[which][row]
        for cell, weight in ((low, STEP - share), (low + 1, share)):
            p = int(cells[cell])
            cells[cell] = p + (((WHOLE - 1 if one else 0) - p) * weight * MAP_RATE >> 23)

    def claim(self, number: int, half: int) -> int:
        """The slot of a context: its own, or the less used of two neighbours, emptied; the other one ages."""
        own = self.slot(number, half)
        if own is not None:
            return own
        first, check = self.place(number, half)
        other = first ^ 1
        if self.check(first) and (not self.check(other) or self.slots[other, 2] < self.slots[first, 2]):
            first, other = other, first
        self.slots[other, 2] -= self.slots[other, 2] > 0
        self.slots[first] = 0
        self.slots[first, :2] = check & 255, check >> 8
        return first

    def learn_half(self, slot: int, number: int, half: int) -> None:
        """Four bits: probabilities, counts and histories of their nodes, and what such histories mean."""
        cells = self.slots[slot]
        cells[2] += cells[2] < 255
        node = 1
        for bit in range(4):
            one = half >> 3 - bit & 1
            low, high, count, history = cells[4 * node : 4 * node + 4].tolist()
            old = int(self.histories[number, history])
            self.histories[number, history] = self.observed(old, bool(one), MOST["history"])
            p = low | high << 8 if count else 32768
            p += (65535 * one - p) * self.rates[count] >> 16
            counted = count + 1 if count < MOST["direct"] else count
            cells[4 * node : 4 * node + 4] = p & 255, p >> 8, counted, self.next[history][one]
            node = 2 * node + one

    def follow(self, byte: int) -> None:
        """Match models go on, and their indices know the position."""
        for number, (_, own) in enumerate(self.matches):
            match = self.found[number].after(self.expected[number] & 255 == byte)
            for place, value in enumerate(match):
                self.arena.set_number(own[2] + 8 * place, value)
            at = self.entries[number]
            if at is not None:
                self.data[at : at + 4].view(np.uint32)[0] = self.arena.position & 0xFFFFFFFF

    # --- bytes -------------------------------------------------------------------------------------------------------

    def step(self, logp: NDArray[np.float32] | None, choose: Callable[[int, int], int]) -> int:
        """Predict eight bits, be told each by `choose(bit, p)`, and learn; returns the byte, -1 where one is -1."""
        self.begin(logp)
        bits: list[Bit] = []
        so_far, slots = 1, self.slots_of(1)
        for bit in range(8):
            if bit == 4:
                slots = self.slots_of(so_far)
            bits.append(self.predict(bit, so_far, slots))
            one = choose(bit, bits[-1].p)
            if one < 0:
                return -1
            so_far = 2 * so_far + one
        self.learn(bits, so_far & 255)
        return so_far & 255

    def read(self, data: NDArray[np.uint8], logp: NDArray[np.float32] | None) -> NDArray[np.int32]:
        """Learn bytes `[n]`; the probability that each bit had `[n, 8]`, in 2^-22."""
        found = np.zeros((len(data), 8), np.int32)
        for i, byte in enumerate(data.tolist()):

            def choose(bit: int, p: int, i: int = i, byte: int = byte) -> int:
                one = byte >> 7 - bit & 1
                found[i, bit] = p if one else WHOLE - p
                return one

            self.step(None if logp is None else logp[i], choose)
        return found

    def nodes(self, logp: NDArray[np.float32] | None) -> NDArray[np.int32]:
        """The probability of a 1 at each node of the tree of a byte's bits `[256]`, in 2^-22; the first is unused."""
        self.begin(logp)
        found = np.zeros(256, np.int32)
        for bit in range(8):
            for so_far in range(1 << bit, 2 << bit):
                slots = self.slots_of(1 if bit < 4 else so_far >> bit - 4)
                found[so_far] = self.predict(bit, so_far, slots).p
        return found
