"""Candidates of the Transformer over bytes and over tokens, see `interfaces.sizes`."""

from __future__ import annotations

from typing import Any

from bytelm.interfaces.sizes import NGRAMS, Family, Table, heads, ngram_rows, ngram_tables, usual
from bytelm.units import VOCAB

TOKEN_NGRAMS: Table = {**NGRAMS, "ngram_sizes": [2, 3]}
"""Of tokens, which are three bytes and more."""


def transformer(width: int, depth_offset: int, **more: Any) -> Table:
    """The Transformer over bytes, with full or windowed attention, or over tokens."""
    return {"name": "transformer", "layers": usual(width) + depth_offset, "dim": width, "heads": heads(width), **more}


FAMILIES = {
    "byte": Family(lambda width, depth_offset, _: transformer(width, depth_offset), rate=8e-3),
    "byte-window": Family(
        lambda width, depth_offset, window: transformer(width, depth_offset, attention_window=window),
        rate=8e-3,
        number=128,
    ),
    "bpe": Family(
        lambda width, depth_offset, ids: transformer(width, depth_offset, vocabulary=ids),
        rate=8e-3,
        number=4096,
        least=VOCAB + 1,
        tokens=True,
    ),
    "byte-window-ngrams": Family(
        lambda width, depth_offset, window: transformer(width, depth_offset, attention_window=window, **NGRAMS),
        rate=8e-3,
        number=128,
        tables=ngram_tables,
        grown=ngram_rows,
    ),
    "bpe-ngrams": Family(
        lambda width, depth_offset, ids: transformer(width, depth_offset, vocabulary=ids, **TOKEN_NGRAMS),
        rate=8e-3,
        number=4096,
        least=VOCAB + 1,
        tables=ngram_tables,
        grown=ngram_rows,
        tokens=True,
    ),
}
