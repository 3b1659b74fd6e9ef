"""The three bytes before the last one: what stands in the place of the last may vary."""

from __future__ import annotations

from bytelm.online.arena import Arena

CODE, PARAMETERS, BYTES = 5, (), 0


def context(arena: Arena, own: int, parameter: int) -> int:
    """The bytes two, three and four before the next one."""
    return arena.last(4) >> 8


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """Nothing of its own."""
