"""Incremental UTF-8: which byte may come next in valid text, and decoding without broken characters."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bytelm.units import BYTES, EOS, VOCAB

# RFC 3629 as an automaton: from a state, a byte in first..last leads to the next state. State 0 is between
# characters; 1, 2, 3 await that many free continuation bytes; 4 to 7 follow the four lead bytes whose second
# byte is narrower, which is what keeps out overlong forms (E0, F0), surrogates (ED) and all above U+10FFFF (F4).
_ARCS = (
    (0, 0x00, 0x7F, 0),
    (0, 0xC2, 0xDF, 1),
    (0, 0xE0, 0xE0, 4),
    (0, 0xE1, 0xEC, 2),
    (0, 0xED, 0xED, 5),
    (0, 0xEE, 0xEF, 2),
    (0, 0xF0, 0xF0, 6),
    (0, 0xF1, 0xF3, 3),
    (0, 0xF4, 0xF4, 7),
    (1, 0x80, 0xBF, 0),
    (2, 0x80, 0xBF, 1),
    (3, 0x80, 0xBF, 2),
    (4, 0xA0, 0xBF, 1),
    (5, 0x80, 0x9F, 1),
    (6, 0x90, 0xBF, 2),
    (7, 0x80, 0x8F, 2),
)
_MISSING = (0, 1, 2, 3, 2, 2, 3, 3)  # bytes from each state to the end of the character
_LONGEST_OPEN = 3  # bytes of the longest unfinished character


@functools.cache
def _table() -> Int[Tensor, "places bytes"]:
    """The state after each byte from each state; -1 for an invalid byte."""
    table = torch.full((len(_MISSING), BYTES), -1)
    for place, first, last, after in _ARCS:
        table[place, first : last + 1] = after
    return table


@dataclass(frozen=True)
class Utf8State:
    """The automaton state of each row (0: between characters)."""

    places: Int[Tensor, " batch"]

    @classmethod
    def after(cls, texts: Sequence[bytes]) -> Utf8State:
        """The rows after `texts`: inside a character if a text ends with an unfinished one."""
        tails = [list(text[-_LONGEST_OPEN:].rjust(_LONGEST_OPEN, b" ")) for text in texts]
        state = cls(torch.zeros(len(texts), dtype=torch.int64))
        for ids in torch.tensor(tails, dtype=torch.int64).view(len(texts), _LONGEST_OPEN).unbind(1):
            state = state.extend(ids)
        return state

    def extend(self, ids: Int[Tensor, " batch"]) -> Utf8State:
        """The rows with one more byte each. An invalid byte is dropped, with the character that it broke."""
        table = _table()
        places = table[self.places, ids]
        return Utf8State(torch.where(places < 0, table[0, ids], places).clamp(min=0))

    def missing(self) -> Int[Tensor, " batch"]:
        """How many bytes each row needs to finish its character."""
        return torch.tensor(_MISSING)[self.places]

    def allowed(self, left: int) -> Bool[Tensor, "batch vocab"]:
        """The ids that keep a row valid and able to finish its character within `left` more bytes.

        EOS is allowed between characters only. A row with `missing() <= left` and `left > 0` has an id to choose,
        and keeps that property with `left - 1` whatever it chooses.
        """
        after = _table()[self.places]
        fits = torch.tensor(_MISSING)[after.clamp(min=0)] < left
        allowed = torch.zeros(len(self.places), VOCAB, dtype=torch.bool)
        allowed[:, :BYTES] = (after >= 0) & fits
        allowed[:, EOS] = self.places == 0
        return allowed


def decode(pieces: Iterable[bytes]) -> Iterator[str]:
    """Text from a stream of bytes: an unfinished character is held back, invalid bytes are U+FFFD."""
    return codecs.iterdecode(pieces, "utf-8", errors="replace")
