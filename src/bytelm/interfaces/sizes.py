"""Candidates of `compare`: `sizes.py` of an architecture has `FAMILIES`, by the names that `--models` accepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HEADS = (32, 48, 16)  # head widths: the first that divides the width; kernels need multiples of 16
WIDE, WIDE_HEADS = 512, (64, *HEADS)  # from this width on: the head width of GPU kernels

Table = dict[str, Any]

NGRAMS: Table = {"ngram_sizes": [2, 3, 4, 5, 6, 8], "ngram_output": True}
"""Entries of [model] for the hashed n-grams of BLT, the same for all families that have them."""
NGRAM_RATE: Table = {"embedding_lr_scale": 6.0}
"""Entries of [train] beside them."""
ROWS = 1 << 13, 1 << 17
"""Rows of an n-gram table, at least and at most: more of them learn more, in memory that small machines do not have."""
READ = 16  # training bytes for each row


@dataclass(frozen=True)
class Family:
    """A kind of model. `shape(width, depth_offset, number)` is its table [model]: `width` over bytes, `depth_offset`
    layers deeper than usual. `rate`: its learning rate at width 128, scaled by the inverse root of the width; or None
    for the default.
    """

    shape: Callable[[int, int, int], Table]
    rate: float | None = None
    number: int = 0
    """The default of the number after the name; None if it takes no number."""
    least: int = 1
    tables: Callable[[int], Table] = field(default=lambda number: {})
    """Further tables of a run."""
    grown: Callable[[float], Table] = field(default=lambda bytes: {})
    """Entries of [model] that grow with the training bytes, and cost no FLOPs: rows of n-gram tables."""
    tokens: bool = False
    """Whether it reads tokens; the number is then its vocabulary."""


def ngram_tables(number: int) -> Table:
    """Further tables of a family with n-grams, whatever its number: see `Family`."""
    return {"train": NGRAM_RATE}


def usual(width: int) -> int:
    """The usual number of layers for a width."""
    return 2 + width // 64


def heads(width: int) -> int:
    """The number of heads for a width."""
    return width // next(head for head in (WIDE_HEADS if width >= WIDE else HEADS) if width % head == 0)


def ngram_rows(bytes: float) -> Table:
    """Rows of n-gram tables for so many training bytes, a power of two."""
    rows = 1 << round(math.log2(max(1.0, bytes / READ)))
    return {"ngram_rows": min(max(rows, ROWS[0]), ROWS[1])}
