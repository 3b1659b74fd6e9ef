"""The last bytes, as many as the number says: the contexts of n-gram models."""

from __future__ import annotations

from bytelm.online.arena import K1, MASK, Arena

CODE, PARAMETERS, BYTES = 1, ((0, 32),), 0


def context(arena: Arena, own: int, parameter: int) -> int:
    """The bytes themselves up to eight, a hash of those before."""
    found = arena.last(min(parameter, 8))
    for back in range(9, parameter + 1):
        found = (found * K1 + (arena.byte(arena.position - back) if back <= arena.position else 0)) & MASK
    return found


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """Nothing of its own."""
