"""Candidates of BLT, see `interfaces.sizes`."""

from __future__ import annotations

import math

from bytelm.interfaces.sizes import Family, Table, heads, usual

ROWS = 1 << 13, 1 << 17
"""Rows of a table, at least and at most: more of them learn more, in memory that small machines do not have."""
READ = 16  # training bytes for each row


def grown(bytes: float) -> Table:
    """Rows of n-gram tables for so many training bytes, a power of two."""
    rows = 1 << round(math.log2(max(1.0, bytes / READ)))
    return {"ngram_rows": min(max(rows, ROWS[0]), ROWS[1])}


def blt(width: int, depth_offset: int, number: int) -> Table:
    """BLT: a shallow encoder, a deeper decoder, and a latent Transformer of twice their width."""
    local = {
        "local_dim": width,
        "local_heads": heads(width),
        "cross_heads": heads(width),
        "attention_window": 128,
        "queries": 2,
    }
    latent = {"global_dim": 2 * width, "global_heads": heads(2 * width), "global_layers": usual(width)}
    return {
        "name": "blt",
        "encoder_layers": 1,
        "decoder_layers": usual(width) + depth_offset - 1,
        **local,
        **latent,
        "ngram_sizes": [2, 3, 4, 5, 6, 8],
        "ngram_output": True,
    }


def entropy_patches(size: int) -> Table:
    """Further tables of BLT."""
    patching = {"name": "entropy", "target_mean_length": float(size)}
    return {"patching": patching, "entropy_model": {"name": "ngram"}, "train": {"embedding_lr_scale": 6.0}}


def space_patches(_: int) -> Table:
    """Further tables of BLT on space patches."""
    return {"patching": {"name": "space"}, "train": {"embedding_lr_scale": 6.0}}


def without_ngrams(width: int, depth_offset: int, number: int) -> Table:
    """BLT without n-gram embeddings."""
    return {**blt(width, depth_offset, number), "ngram_sizes": [], "ngram_output": False}


FAMILIES = {
    "blt": Family(blt, rate=9e-3, number=5, least=2, tables=entropy_patches, grown=grown),
    "blt-no-ngrams": Family(without_ngrams, rate=9e-3, number=5, least=2, tables=entropy_patches),
    "space": Family(blt, rate=9e-3, tables=space_patches, grown=grown),
}
