"""Candidates of the linear Transformer, see `interfaces.sizes`."""

from __future__ import annotations

from bytelm.interfaces.sizes import Family, Table, heads, usual


def linear(width: int, depth_offset: int, number: int) -> Table:
    """The linear Transformer."""
    # A smaller theta than usual: without a softmax, positions must differ more for a byte to find its neighbours.
    return {"name": "linear", "layers": usual(width) + depth_offset, "dim": width, "heads": heads(width), "theta": 30.0}


FAMILIES = {"linear": Family(linear, rate=8e-3)}
