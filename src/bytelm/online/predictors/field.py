"""A byte of a record by its place in it and by neighbours: files of records of one size, arrays of wide numbers.

field:24:5 is of records of 24 bytes, by the place, the byte above (a record back) and the last one. The second number
adds up what is looked at: 1 the byte above, 2 the one above that, 4 the last byte, 8 the byte that continues those
two evenly, as in a counter.
"""

from __future__ import annotations

from bytelm.online.arena import Arena

CODE, PARAMETERS, BYTES = 11, ((1, 1 << 20), (0, 15)), 0
BITS = 21  # of the size of a record


def context(arena: Arena, own: int, parameter: int) -> int:
    """The place, then the bytes that are looked at; 0 stands for one before the file."""
    size, looked_at = parameter & (1 << BITS) - 1, parameter >> BITS

    def back(distance: int) -> int:
        return arena.byte(arena.position - distance) if arena.position >= distance else 0

    found = arena.position % size
    for bit, byte in enumerate((back(size), back(2 * size), back(1), 2 * back(size) - back(2 * size) & 255)):
        if looked_at >> bit & 1:
            found = found << 8 | byte
    return found


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """Nothing of its own."""
