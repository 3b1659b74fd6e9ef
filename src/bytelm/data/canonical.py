"""Which tokens can follow in a canonical encoding: one that `Bpe.encode` gives to some bytes.

A sequence of tokens is *canonical* if the encoding of some document begins with it. Most sequences are not: b"th" as
two bytes where there is a token for both, or a letter by itself where the word must go on in one token. Two things
decide.

**The pair.** Within a word a sequence is canonical if each pair of neighbours is. Tokens l and r are not if a merge
across them would have come first: there are x on the right edge of l's tree of merges and y on the left edge of r's,
and a merge of (x, y) that is earlier than the one that takes x away in l, and not later than the one that takes y away
in r (of equal merges the left one is first; nothing takes l and r themselves away). That pairs decide is shown by
Vieira et al. (2025, "Language Models over Canonical Byte-Pair Encodings").

**The word.** Words are cut from the bytes before merges (`bpe.WORDS`), so that tokens never reach across two. Where the
next token may begin a word depends on the run of bytes that the open word is:

    letters, digits or others     up to LONGEST bytes, then a word of the same begins; anything else begins one too
    whitespace, more follows      up to LONGEST bytes, then a word of whitespace begins
    whitespace, nothing follows   is one word
    whitespace, others follow     its last byte is apart: a space begins the word of what follows, others are a word

So after whitespace there are two readings until the next byte is known, and `Place` holds both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytelm.data.bpe import LONGEST, NONE, Bpe
from bytelm.errors import DataError
from bytelm.units import BYTES, VOCAB

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Packed = NDArray[np.uint8]
"""Flags of the sorted tokens, eight in a byte."""

WHITE, LETTER, DIGIT, OTHER = range(4)
SPACE = ord(" ")
_NEVER = 1 << 40  # later than any merge


def _kinds() -> NDArray[np.uint8]:
    kinds = np.full(BYTES, OTHER, np.uint8)
    kinds[[*range(ord("\t"), ord("\r") + 1), SPACE]] = WHITE
    kinds[[*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1), *range(0x80, BYTES)]] = LETTER
    kinds[ord("0") : ord("9") + 1] = DIGIT
    return kinds


KINDS = _kinds()
"""The kind of each byte, as `bpe.WORDS` has it."""


class Place(NamedTuple):
    """Where in a word a canonical sequence ends."""

    kind: int
    """The kind of the bytes of the open word."""
    run: int
    """How many of them there are, without a space before them; 0 where no word is open that ends here or goes on."""
    alone: bool = False
    """Whether the last token may be the last byte of whitespace before something else."""

    @property
    def ends(self) -> bool:
        """Whether a document may end here."""
        return self == START or self.run > 0


START = Place(WHITE, 0)
"""No word is open: at the start of a document."""


class Canonical:
    """The tokens that occur in canonical encodings, sorted by their bytes, and which may follow which."""

    def __init__(self, tokens: Bpe, longest: int = LONGEST) -> None:
        """`longest`: bytes of a run, as in `bpe.WORDS`. Raises DataError if two ids stand for the same bytes."""
        refuse_twins(tokens)
        self.tokens, self.longest = tokens, longest
        used = sorted(
            (data, id) for id, data in enumerate(tokens.data) if data and tokens.encode(data).tolist() == [id]
        )
        self.ids = np.array([id for _, id in used])
        """Id of each sorted token, `[tokens]`."""
        self.sizes = tokens.sizes[self.ids]
        """Bytes of each sorted token, `[tokens]`."""
        width = int(self.sizes.max())
        self.bytes = np.frombuffer(b"".join(data.ljust(width, b"\0") for data, _ in used), np.uint8).reshape(-1, width)
        """Bytes of each sorted token, filled up with zeros, `[tokens, most]`."""
        second = KINDS[self.bytes[:, min(1, width - 1)]]
        self._spaced = (self.bytes[:, 0] == SPACE) & (self.sizes > 1) & (second != WHITE)
        self._kinds = KINDS[self.bytes[np.arange(len(used)), self.sizes - 1]]
        self._runs = self.sizes - self._spaced
        self._plain = np.packbits(~self._spaced & (self._kinds != WHITE))
        self._edges = self._left_edges()
        self._by_left = np.argsort(tokens.merges[:, 0], kind="stable")
        self._lefts = tokens.merges[self._by_left, 0]
        self._pairs: dict[int, Packed] = {}
        self._words: dict[Place, tuple[Packed, Packed]] = {}
        self._space_goes_on = bool((self.pairs(SPACE) & self._plain).any())

    def allowed(self, place: Place, last: int) -> Packed:
        """The tokens that may follow the id `last`, after which the sequence is at `place`."""
        begins, same = self._word(place)
        if place == START:
            return begins
        found = begins | (same & self.pairs(last))
        if place.alone:
            found |= self._plain & self.pairs(last) if last == SPACE else self._plain
        return found

    def after(self, place: Place, last: int, token: int) -> Place:
        """The place after the sorted token number `token`, which is allowed."""
        kind, run = int(self._kinds[token]), int(self._runs[token])
        goes_on = place.run > 0 and place.kind == kind and not bool(self._spaced[token])
        if kind != WHITE:
            return Place(kind, run + place.run if goes_on and place.run < self.longest else run)
        alone = run == 1 and (self._space_goes_on or int(self.ids[token]) != SPACE)
        if goes_on and place.run < self.longest:
            run = run + place.run if run + place.run <= self.longest and has(self.pairs(last), token) else 0
        return Place(WHITE, run, alone)

    def pairs(self, last: int) -> Packed:
        """The tokens that may follow the id `last` in one word."""
        if last not in self._pairs:
            first = np.full(self.tokens.vocabulary, _NEVER + 1)  # the first merge that would take each id away
            node, taken = last, _NEVER
            while node != NONE:
                begin, end = np.searchsorted(self._lefts, [node, node + 1])
                merges = self._by_left[begin:end]
                merges = merges[merges < taken]
                rights = self.tokens.merges[merges, 1]
                first[rights] = np.minimum(first[rights], merges)
                taken = node - VOCAB
                node = int(self.tokens.merges[taken, 1]) if taken >= 0 else NONE
            token, edge, edge_taken = self._edges
            flags = np.ones(len(self.ids), bool)
            flags[token[first[edge] <= edge_taken]] = False
            self._pairs[last] = np.packbits(flags)
        return self._pairs[last]

    def _left_edges(self) -> tuple[Ints, Ints, Ints]:
        """What is on the left edge of each token's tree: the token, the id there, the merge that takes it away."""
        token, node = np.arange(len(self.ids)), self.ids
        taken = np.full_like(node, _NEVER)
        parts = [(token, node, taken)]
        while (made := node >= VOCAB).any():
            token, taken = token[made], node[made] - VOCAB
            node = self.tokens.merges[taken, 0]
            parts.append((token, node, taken))
        tokens, nodes, merges = (np.concatenate(column) for column in zip(*parts, strict=True))
        return tokens, nodes, merges

    def _word(self, place: Place) -> tuple[Packed, Packed]:
        """The tokens that may begin a word after `place`, and those that may go on in its own if the pair may."""
        if place not in self._words:
            kind, run, _ = place
            white, plain = self._kinds == WHITE, ~self._spaced & (self._kinds == kind)
            full, fits = run == self.longest, self._runs <= self.longest - run
            if place == START:
                begins, same = np.ones_like(white), np.zeros_like(white)
            elif not run:
                begins = same = np.zeros_like(white)
            elif kind == WHITE:
                single = (self._runs == 1) & (self._space_goes_on | (self.ids != SPACE))
                begins, same = self._spaced | (white & (single | full)), white & fits
            else:
                begins, same = ~plain | full, plain & fits
            self._words[place] = np.packbits(begins), np.packbits(same)
        return self._words[place]


def refuse_twins(tokens: Bpe) -> None:
    """Raises DataError if two ids stand for the same bytes: which of them is made depends on more than pairs."""
    known: dict[bytes, int] = {}
    for id, data in enumerate(tokens.data):
        if data and known.setdefault(data, id) != id:
            raise DataError(f"tokens {known[data]} and {id} stand for the same bytes: train the vocabulary again")


def has(flags: Packed, place: int) -> bool:
    """One of the flags."""
    return bool(flags[place >> 3] >> (7 - (place & 7)) & 1)


def part(flags: Packed, low: int, high: int) -> Flags:
    """Those from `low` to `high`."""
    return np.unpackbits(flags[low >> 3 : (high + 7) >> 3])[low & 7 : (low & 7) + high - low].view(bool)
