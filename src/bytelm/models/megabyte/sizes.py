"""Candidates of MEGABYTE, see `interfaces.sizes`."""

from __future__ import annotations

from bytelm.interfaces.sizes import NGRAMS, Family, Table, heads, ngram_rows, ngram_tables, usual

WINDOW = 64  # bytes that the byte stage across patches sees


def megabyte(width: int, depth_offset: int, number: int) -> Table:
    """MEGABYTE: the global model twice as wide as the local one."""
    dims, layers = [2 * width, width], [usual(width), usual(width) + depth_offset]
    table = {"name": "megabyte", "sizes": [number], "dims": dims, "layers": layers, "reach": number}
    return {**table, "heads": [heads(dim) for dim in dims]}


def across(width: int, depth_offset: int, number: int) -> Table:
    """MEGABYTE with a byte stage across patches, and the n-grams of BLT."""
    table = megabyte(width, depth_offset, number)
    return {**table, "reach": 0, "local_window": WINDOW, **NGRAMS}


FAMILIES = {
    "megabyte": Family(megabyte, rate=6e-3, number=8, least=2),
    "megabyte-across": Family(across, rate=6e-3, number=8, least=2, tables=ngram_tables, grown=ngram_rows),
}
