"""What a byte is where it continues those at some distances evenly: in images, its colour by its neighbours.

plane:3:3:192:0 is of pixels of 3 bytes in rows of 192: left + above - above left, as if brightness were a plane. A
third distance corrects that by how wrong it was there: 1 is the colour before. With one it is the byte itself.
"""

from __future__ import annotations

from bytelm.online.arena import Arena

FAR = (1 << 20) - 1
CODE, PARAMETERS, BYTES = 8, ((1, 7), (1, FAR), (0, FAR), (0, FAR)), 0


def context(arena: Arena, own: int, parameter: int) -> int:
    """The expected byte, and which byte of a pixel it is; distances of 0 are left out."""
    distances = [distance for shift in (3, 23, 43) if (distance := parameter >> shift & FAR)]
    return min(max(expected(arena, 0, distances), 0), 255) << 3 | arena.position % (parameter & 7)


def expected(arena: Arena, back: int, distances: list[int]) -> int:
    """The number that follows from those at all distances, for the byte `back` before the next one."""
    *others, distance = distances
    there = arena.position - back - distance
    found = arena.byte(there) if there >= 0 else 0
    if others:
        found += expected(arena, back, others) - expected(arena, back + distance, others)
    return found


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """Nothing of its own."""
