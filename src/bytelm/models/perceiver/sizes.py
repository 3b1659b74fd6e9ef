"""Candidates of PerceiverAR, see `interfaces.sizes`."""

from __future__ import annotations

from bytelm.interfaces.sizes import Family, Table, heads, usual


def perceiver(width: int, depth_offset: int, number: int) -> Table:
    """PerceiverAR."""
    layers = usual(width) + depth_offset - 1  # the cross-attention is one more
    return {"name": "perceiver", "latents": number, "layers": layers, "dim": width, "heads": heads(width)}


FAMILIES = {"perceiver": Family(perceiver, rate=8e-3, number=256)}
