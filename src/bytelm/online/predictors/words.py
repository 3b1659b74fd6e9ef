"""The word so far and the word before."""

from __future__ import annotations

from bytelm.online.arena import K2, MASK, Arena
from bytelm.online.predictors import word

CODE, PARAMETERS, BYTES = 3, (), 16


def context(arena: Arena, own: int, parameter: int) -> int:
    """A hash of both."""
    return (arena.number(own) * K2 + arena.number(own + 8)) & MASK


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """As `word` does."""
    word.note(arena, own, parameter, byte)
