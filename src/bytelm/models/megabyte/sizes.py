"""Candidates of MEGABYTE, see `interfaces.sizes`."""

from __future__ import annotations

from bytelm.interfaces.sizes import Family, Table, heads, usual


def megabyte(width: int, depth_offset: int, number: int) -> Table:
    """MEGABYTE: the global model twice as wide as the local one."""
    dims, layers = [2 * width, width], [usual(width), usual(width) + depth_offset]
    table = {"name": "megabyte", "sizes": [number], "dims": dims, "layers": layers, "reach": number}
    return {**table, "heads": [heads(dim) for dim in dims]}


FAMILIES = {"megabyte": Family(megabyte, rate=6e-3, number=8, least=2)}
