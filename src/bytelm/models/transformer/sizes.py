"""The byte Transformer, and the Transformer over tokens, in every size: see `interfaces.sizes`."""

from __future__ import annotations

from typing import Any

from bytelm.interfaces.sizes import Family, Table, heads, usual
from bytelm.units import VOCAB


def transformer(width: int, odd: int, **more: Any) -> Table:
    """The Transformer over bytes, all of them or those in a window, or over tokens."""
    return {"name": "transformer", "layers": usual(width) + odd, "dim": width, "heads": heads(width), **more}


FAMILIES = {
    "byte": Family(lambda width, odd, _: transformer(width, odd), rate=8e-3),
    "byte-window": Family(lambda width, odd, window: transformer(width, odd, window=window), rate=8e-3, number=128),
    "bpe": Family(
        lambda width, odd, ids: transformer(width, odd, vocabulary=ids),
        rate=8e-3,
        number=4096,
        least=VOCAB + 1,
        tokens=True,
    ),
}
