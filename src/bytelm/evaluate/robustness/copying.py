"""What does a model save when what it reads is there a second time?

A string X is scored after X and a newline, and after another string of its kind and a newline. The difference is what
is gained by copying, and not by knowing how such strings look; what is scored are the same bytes both times.

    hex, base64         of random bytes
    rare words          of the texts, 3 occurrences each at least
    unseen words        random letters
    bytes               random, without newlines
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

from numpy.random import Generator

from bytelm.data.words import Vocabulary
from bytelm.evaluate.published import texts
from bytelm.evaluate.robustness.base import Item, Query, Sources, generator

TITLE = "strings read a second time"
NEEDS = ""

SIZE = 48  # bytes of a string, or the first space or character after them
LEAST = 3  # occurrences of a rare word


def hexadecimal(draw: Generator) -> bytes:
    """Random hex digits."""
    return draw.bytes(SIZE // 2).hex().encode()


def base_64(draw: Generator) -> bytes:
    """Random bytes in base64."""
    return base64.b64encode(draw.bytes(SIZE // 4 * 3))


def unseen(draw: Generator) -> bytes:
    """Words of 3 to 10 random letters."""
    return filled(lambda: "".join(map(chr, draw.integers(ord("a"), ord("z") + 1, int(draw.integers(3, 11))))))


def random_bytes(draw: Generator) -> bytes:
    """Random bytes, a space for each newline."""
    return draw.bytes(SIZE).replace(b"\n", b" ")


def filled(word: Callable[[], str]) -> bytes:
    """Words with spaces between them, up to the size."""
    found = word()
    while len(found.encode()) < SIZE:
        found += f" {word()}"
    return found.encode()


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """`amount` strings of each kind; rare words where the texts have any."""
    kinds = {"hex": hexadecimal, "base64": base_64, "unseen words": unseen, "bytes": random_bytes}
    if len(rare := rare_words(sources)) > 1:
        kinds["rare words"] = lambda draw: filled(lambda: rare[int(draw.integers(len(rare)))])
    for name, make in kinds.items():
        for number in range(amount):
            draw = generator(seed, "copying", name, number)
            one, other = make(draw), make(draw)
            queries = (Query(prefix, b"\n" + one) for prefix in (other, one))
            yield Item(name, f"{name} {number}", "difference", tuple(queries))


def rare_words(sources: Sources) -> list[str]:
    """The rarer half of the words of the texts."""
    counts = Vocabulary.of(data for _, data in texts(sources).documents).counts
    known = [word for word, count in counts.items() if count >= LEAST]
    return sorted(known[len(known) // 2 :])
