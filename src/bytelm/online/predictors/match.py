"""The longest earlier place where the last bytes stood, from as many as the number says, and the byte that came then.

An index by a hash of the last bytes has where they stood last; the bytes themselves are compared. A match that fails
is followed further, as its bytes may differ in one place; after nine misses it is given up. While it is shorter than
16 bytes, a longer one is looked for.
"""

from __future__ import annotations

from typing import NamedTuple

from bytelm.online.arena import K1, MASK, Arena

CODE, PARAMETERS, BYTES = 9, ((1, 64),), 24
LONGEST, VERIFIED, MISSES, ENOUGH = 65535, 400, 8, 16


class Match(NamedTuple):
    """Where the expected byte stands, 0 for none; how many bytes before it were the same; misses since."""

    pointer: int
    length: int
    misses: int

    @property
    def bucket(self) -> int:
        """The length and the misses in 188 classes."""
        n = min(self.length, LONGEST)
        for most, first, begin, width in ((16, 0, 0, 1), (32, 16, 16, 2), (64, 24, 32, 4), (512, 32, 64, 32)):
            if n < most:
                return (first + (n - begin) // width) * 4 + min(self.misses, 3)
        return 46 * 4 + min(self.misses, 3)

    def after(self, hit: bool) -> Match:
        """The match after the byte that it expected, or another one."""
        if not self.pointer:
            return self
        if hit:
            length = min(self.length + 1, LONGEST)
            return Match(self.pointer + 1, length, 0 if length > ENOUGH else self.misses)
        return NONE if self.misses == MISSES else Match(self.pointer + 1, 0, self.misses + 1)


NONE = Match(0, 0, 0)


def entry(arena: Arena, least: int, number: int) -> int | None:
    """Where the index has the position after the last `least` bytes; None before there are as many."""
    if arena.position < least:
        return None
    found = 0
    for back in range(1, least + 1):
        found = (found + arena.byte(arena.position - back) + 1) * K1 & MASK
    size = 2 * arena.layout.slots
    return arena.layout.places["index"] + 4 * (number * size + (found >> 32 & size - 1))


def current(arena: Arena, own: int, least: int, at: int | None) -> Match:
    """The match before the next byte: the one that is followed, or a longer one."""
    match = Match(*(arena.number(own + 8 * n) for n in range(3)))
    if arena.position - match.pointer > arena.ring_mask:
        match = NONE
    if at is None or match.length >= ENOUGH:
        return match
    distance = (arena.position - int(arena.data[at : at + 4].view("<u4")[0])) & 0xFFFFFFFF
    to = arena.position - distance
    if distance < 1 or to < 1 or distance > arena.ring_mask or to == match.pointer:
        return match
    length = same_before(arena, to)
    return Match(to, length, 0) if length >= least and length > match.length else match


def same_before(arena: Arena, to: int) -> int:
    """How many bytes before `to` are those before the position."""
    most = min(VERIFIED, to, arena.ring_mask + 1 - (arena.position - to))
    length = 0
    while length < most and arena.byte(to - 1 - length) == arena.byte(arena.position - 1 - length):
        length += 1
    return length
