"""How a line begins: how many blanks it is indented by, and its first other byte; with the last byte."""

from __future__ import annotations

from bytelm.online.arena import MASK, Arena

CODE, PARAMETERS, BYTES = 4, (), 16


def context(arena: Arena, own: int, parameter: int) -> int:
    """The beginning of the line, and the last byte."""
    return (arena.number(own) << 8 | arena.last(1)) & MASK


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """own: the number of blanks, then 256 times that and the first other byte; whether that was seen."""
    if byte == 10:
        arena.set_number(own, 0)
        arena.set_number(own + 8, 0)
    elif not arena.number(own + 8):
        blanks, blank = arena.number(own), byte in (9, 32)
        arena.set_number(own, blanks + 1 if blank else (blanks << 8 | byte) & MASK)
        arena.set_number(own + 8, int(not blank))
