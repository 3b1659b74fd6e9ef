"""What a robustness suite is made of: items, each a few queries to a model, and how an item counts.

A suite is a module in this folder:

    TITLE      what it measures, in a line
    NEEDS      the files it needs, in words; empty where any text will do
    items      (sources, amount, seed) -> the items, up to about `amount` in each row, in an order that does not matter
    summary    optional: {row: {figure: value}} -> further figures of the whole, by name
    HEADLINE   optional: the further figure that stands for the suite where there is room for one; without it, the mean
               over rows of the main figure of their kinds (MAIN)
    PER        optional: what a unit is, such as "article": bits, patches and seconds per unit are figures too
    reference  optional: (rows) -> the row that has the same units as the others, to whose bits theirs are related

    kind         queries, and figures
    bits         1 query: the `bits_per_byte` of its continuation
    difference   2 queries with one continuation, after a changed prefix and after the original one: bits per byte of
                 each (`changed`, `original`), and their `difference`. So the entropy of a change itself is not counted.
    cut          3 queries, (prefix, rest), (b"", prefix + rest) and (b"", prefix): bits per byte of the rest after a
                 prompt that ends there (`changed`), and in the document that goes on (`original`), the second query's
                 nats less the third's; and their `difference`. 0 for a model over bytes, by the chain rule.
    choice       2 or more queries, the right one first: `accuracy`, how often it is the most probable one, and its
                 `bits_per_byte`
    generation   1 query: `exact_match`, how often the model, greedily, generates just its continuation, up to the end
                 of a line
    document     1 query without a prefix, read as a whole: `bits_per_byte`, `bytes_per_patch`, `bytes_per_second`; with
                 PER `bits_per_unit`, `patches_per_unit`, `seconds_per_unit`; with `reference` `relative`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["bits", "difference", "cut", "choice", "generation", "document"]
MAIN: dict[Kind, str] = {
    "choice": "accuracy",
    "difference": "difference",
    "cut": "difference",
    "bits": "bits_per_byte",
    "document": "bits_per_byte",
    "generation": "exact_match",
}
"""The main figure of each kind; of rows of several kinds, that of the kind which comes first here."""
MOST = {"bits": 1, "difference": 2, "cut": 3, "choice": 64, "generation": 1, "document": 1}


@dataclass(frozen=True)
class Query:
    """How probable is `continuation` after `prefix`, which begins a document? All of both are bytes."""

    prefix: bytes
    continuation: bytes


@dataclass(frozen=True)
class Item:
    """What counts once: in the row `row` of the suite's table, and in the bootstrap with all items of one `unit`.

    A unit is what is independent of others: a document, or a word. Raises ValueError for queries that are not of the
    kind.
    """

    row: str
    unit: str
    kind: Kind
    queries: tuple[Query, ...]

    def __post_init__(self) -> None:
        least = min(2, MOST[self.kind])
        if not least <= len(self.queries) <= MOST[self.kind] or not all(query.continuation for query in self.queries):
            raise ValueError(f"{len(self.queries)} queries, or an empty continuation, in a {self.kind} item {self.row}")
        if self.kind == "difference" and len({query.continuation for query in self.queries}) > 1:
            raise ValueError(f"the continuations of a difference differ in {self.row}")
        if self.kind == "cut" and self.queries != cut(self.queries[0].prefix, self.queries[0].continuation):
            raise ValueError(f"the queries of a cut do not belong together in {self.row}")
        if self.kind == "document" and self.queries[0].prefix:
            raise ValueError(f"a document has no prefix, and {self.row} has one")


def cut(prefix: bytes, rest: bytes) -> tuple[Query, ...]:
    """The queries of a document that is cut in two."""
    return Query(prefix, rest), Query(b"", prefix + rest), Query(b"", prefix)


@dataclass(frozen=True)
class Sources:
    """What items are made of: the documents given, as (name, bytes), in order.

    A name is that of a file, relative to the folder that was given.
    """

    documents: Sequence[tuple[str, bytes]]

    def excerpts(self, size: int, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
        """Up to `count` excerpts of `size` bytes, (document, bytes), that do not overlap, evenly drawn over all bytes.

        They begin at a character, where the document is UTF-8. Of a shorter document the whole is one excerpt where it
        has half the size.
        """
        places = [
            (number, start)
            for number, (_, data) in enumerate(self.documents)
            for start in range(0, max(len(data) - size, 0) + 1, size)
            if len(data) - start >= size // 2
        ]
        chosen = generator(seed, "excerpts").permutation(len(places))[:count]
        for number, start in (places[index] for index in sorted(chosen.tolist())):
            name, data = self.documents[number]
            yield name, data[character(data, start) : character(data, min(start + size, len(data)))]


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Random numbers from a seed and from names, which do not depend on what else was drawn."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(list(digest))


def character(data: bytes, place: int) -> int:
    """The first place from `place` on at which no UTF-8 character goes on; `place` itself where that is not text."""
    for later in range(place, min(place + 4, len(data))):
        if data[later] & 0xC0 != 0x80:
            return later
    return min(place, len(data))


def checksum(items: Iterable[Item]) -> str:
    """SHA-256 of items, whatever their order: two that have it were asked the same."""
    lines = sorted(
        json.dumps([item.row, item.unit, item.kind, [[q.prefix.hex(), q.continuation.hex()] for q in item.queries]])
        for item in items
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
