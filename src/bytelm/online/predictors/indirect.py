"""What followed the last two bytes the last two times, and the last byte."""

from __future__ import annotations

from bytelm.online.arena import Arena

CODE, PARAMETERS, BYTES = 6, (), 2 << 16


def context(arena: Arena, own: int, parameter: int) -> int:
    """The two bytes that followed, and the last byte."""
    return arena.half(own + 2 * arena.last(2)) << 8 | arena.last(1)


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """own: by two bytes, the two bytes that followed them."""
    at = own + 2 * arena.last(2)
    arena.set_half(at, (arena.half(at) << 8 | byte) & 0xFFFF)
