"""Candidates of H-Net, see `interfaces.sizes`."""

from __future__ import annotations

from bytelm.interfaces.sizes import NGRAMS, Family, Table, heads, ngram_rows, ngram_tables, usual


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


def with_ngrams(width: int, depth_offset: int, length: int) -> Table:
    """The same with the n-grams of BLT, so that what is compared is how patches come about."""
    return {**one_stage(width, depth_offset, length), **NGRAMS}


FAMILIES = {
    "hnet": Family(with_ngrams, rate=6e-3, number=5, least=2, tables=ngram_tables, grown=ngram_rows),
    "hnet-no-ngrams": Family(one_stage, rate=6e-3, number=5, least=2),
}
