"""Documents that are no language: how far a model adapts to them, and whether it still patches and runs as it should.

They are generated, so that no file is needed. Random bytes have 8 bits each, and no model is below that for long; how
far above it is says how sure it is of what it cannot know. In runs, patches of unlimited length would grow without end.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping

import numpy as np

from bytelm.evaluate.robustness.base import Item, Query, Sources, generator

SIZE = 1024  # bytes of a document
TITLE = "bits per byte, patches and speed on documents that are no language"
NEEDS = ""
HEADLINE = "bits/byte of the worst row"


def texts(random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """(row, document) of every kind, as long as SIZE or longer."""
    yield "runs of one byte", bytes([int(random.integers(33, 127))]) * SIZE
    yield "long whitespace", whitespace(random)
    yield "base64", base64.b64encode(random.bytes(SIZE))
    yield "minified JSON", minified(random)
    yield "NULs", bytes(SIZE)
    yield "random bytes", random.bytes(SIZE)


def whitespace(random: np.random.Generator) -> bytes:
    """Runs of spaces and of tabs, each ended by a word: indentation gone wrong."""
    line = b"".join(
        (b" ", b"\t")[int(random.integers(2))] * int(random.integers(64, 256)) + b"x\n" for _ in range(SIZE // 64)
    )
    return line[:SIZE]


def minified(random: np.random.Generator) -> bytes:
    """JSON without a space, of numbers and words made of letters at random."""
    rows = [
        {
            "id": int(random.integers(1 << 31)),
            "x": round(float(random.normal()), 6),
            "tag": "".join(map(chr, random.integers(97, 123, 6))),
            "on": bool(random.integers(2)),
            "at": None,
        }
        for _ in range(SIZE // 32)
    ]
    return json.dumps(rows, separators=(",", ":")).encode()


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """A quarter of `amount` documents of each kind."""
    for number in range(max(2, amount // 4)):
        for row, data in texts(generator(seed, "degenerate", number)):
            yield Item(row, f"{row} {number}", "document", (Query(b"", data[:SIZE]),))


def summary(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The bits per byte of the kind of document that costs the most."""
    return {HEADLINE: max(figures["bits_per_byte"] for figures in rows.values())}
