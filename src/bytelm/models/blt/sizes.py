"""Candidates of BLT, see `interfaces.sizes`."""

from __future__ import annotations

from bytelm.interfaces.sizes import NGRAM_RATE, NGRAMS, Family, Table, heads, ngram_rows, usual


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
        **NGRAMS,
    }


def entropy_patches(size: int) -> Table:
    """Further tables of BLT."""
    patching = {"name": "entropy", "target_mean_length": float(size)}
    return {"patching": patching, "entropy_model": {"name": "ngram"}, "train": NGRAM_RATE}


def space_patches(_: int) -> Table:
    """Further tables of BLT on space patches."""
    return {"patching": {"name": "space"}, "train": NGRAM_RATE}


def without_ngrams(width: int, depth_offset: int, number: int) -> Table:
    """BLT without n-gram embeddings."""
    return {**blt(width, depth_offset, number), "ngram_sizes": [], "ngram_output": False}


FAMILIES = {
    "blt": Family(blt, rate=9e-3, number=5, least=2, tables=entropy_patches, grown=ngram_rows),
    "blt-no-ngrams": Family(without_ngrams, rate=9e-3, number=5, least=2, tables=entropy_patches),
    "space": Family(blt, rate=9e-3, tables=space_patches, grown=ngram_rows),
}
