"""The byte at a distance, such as a row of an image or a record of a table, and the last one."""

from __future__ import annotations

from bytelm.online.arena import Arena

CODE, PARAMETERS, BYTES = 7, ((1, 1 << 20),), 0


def context(arena: Arena, own: int, parameter: int) -> int:
    """Both bytes; 0 stands for the one above the first row."""
    above = arena.position - parameter
    return (arena.byte(above) if above >= 0 else 0) << 8 | arena.last(1)


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """Nothing of its own."""
