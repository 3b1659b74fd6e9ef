"""The words of texts: letters alone, in lower case, with how often they occur; and which of them no curriculum has.

    training words      of at most 8 letters, and not held out: what a curriculum (`data.curriculum`) asks about
    held-out words      of at most 8 letters, one in eight, by a hash of the word
    longer words        of 9 to 12 letters

So that it is known of every word, whatever the texts and the seed, whether a model was trained to take it apart.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from typing import Literal

Group = Literal["training words", "held-out words", "longer words"]
GROUPS: tuple[Group, ...] = ("training words", "held-out words", "longer words")
SHORTEST, LONGEST, LONGER = 3, 8, 12  # letters: of any word; of a training word; of a longer word
HELD_OUT = 8  # one word in so many
PUNCTUATION = string.punctuation + "“”‘’„‚«»‹›…–—¡¿、。，！？：；（）「」『』।"


def decoded(data: bytes) -> str:
    """Text whose bytes can be had again: `encoded`. Bytes that are no UTF-8 become characters that are no letters."""
    return data.decode("utf-8", "surrogateescape")


def encoded(text: str) -> bytes:
    """The bytes of a `decoded` text."""
    return text.encode("utf-8", "surrogateescape")


def bare(token: str) -> str:
    """The word in a token (what is between white space), without the punctuation around it.

    "" where that is not letters alone, or not in lower case: of names, of "don't", of "x2", of "café" in Latin-1.
    """
    word = token.strip(PUNCTUATION)
    return word if word.isalpha() and word == word.lower() else ""


@dataclass(frozen=True)
class Vocabulary:
    """What occurs in texts."""

    counts: Mapping[str, int]
    """Word → how often, the most frequent first."""
    forms: Set[str]
    """Every token without the punctuation around it, in lower case: names and all."""

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> Vocabulary:
        """The vocabulary of texts, which are read a line at a time."""
        tokens: Counter[str] = Counter()
        for text in texts:
            for line in BytesIO(text):
                tokens.update(decoded(line).split())
        words: Counter[str] = Counter()
        for token, count in tokens.items():
            if word := bare(token):
                words[word] += count
        forms = {token.strip(PUNCTUATION).lower() for token in tokens}
        return cls(dict(sorted(words.items(), key=lambda item: (-item[1], item[0]))), forms)

    def words(self, least: int = 1) -> list[str]:
        """The words that occur at least so often, in alphabetical order."""
        return sorted(word for word, count in self.counts.items() if count >= least)


def is_held_out(word: str) -> bool:
    """Whether a word is among those that no curriculum has, because of its hash."""
    return sha256(encoded(word)).digest()[0] % HELD_OUT == 0


def group_of(word: str) -> Group | None:
    """Where a word belongs; None for one that is too short or too long, or one letter all along."""
    if len(set(word)) < 2:
        return None
    if LONGEST < len(word) <= LONGER:
        return "longer words"
    if not SHORTEST <= len(word) <= LONGEST:
        return None
    return "held-out words" if is_held_out(word) else "training words"


def found_in(text: str) -> Iterator[tuple[int, str]]:
    """(place, word) of each word of a text, as `bare` has them."""
    place = 0
    for token in text.split():
        place = text.index(token, place)
        if word := bare(token):
            yield place + token.index(word), word
        place += len(token)
