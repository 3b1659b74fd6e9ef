"""Candidates of H-Net, see `interfaces.sizes`."""

from __future__ import annotations

from bytelm.interfaces.sizes import Family, Table, heads, usual


def one_stage(width: int, depth_offset: int, length: int) -> Table:
    """H-Net of one stage: a shallow encoder, a deeper decoder, an inner Transformer of twice their width."""
    return {
        "name": "hnet",
        "dims": [width, 2 * width],
        "heads": [heads(width), heads(2 * width)],
        "encoder_layers": [1],
        "decoder_layers": [usual(width) + depth_offset - 1],
        "layers": usual(width),
        "ratios": [float(length)],
        "ratio_weight": 0.1,  # the paper's 0.03 takes longer to reach the ratio than such trainings last
    }


FAMILIES = {"hnet": Family(one_stage, rate=6e-3, number=5, least=2)}
