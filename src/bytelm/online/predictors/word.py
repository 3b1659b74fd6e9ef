"""The word so far and the last byte. Letters, digits, underscores and bytes beyond ASCII make words."""

from __future__ import annotations

from bytelm.online.arena import K1, MASK, Arena, in_word

CODE, PARAMETERS, BYTES = 2, (), 16


def context(arena: Arena, own: int, parameter: int) -> int:
    """A hash of the word; 0 between words."""
    return (arena.number(own) + arena.last(1)) & MASK


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """own: the hash of the word so far, and that of the last whole one."""
    word = arena.number(own)
    if in_word(byte):
        arena.set_number(own, (word + byte + 1) * K1 & MASK)
    elif word:
        arena.set_number(own + 8, word)
        arena.set_number(own, 0)
