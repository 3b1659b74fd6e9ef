"""A sample of documents, evenly spaced over a split."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpora import Corpora
from bytelm.data.corpus import Corpus, Split
from bytelm.data.mixture import largest_remainders
from bytelm.errors import DataError


def sample_evenly(corpus: Corpus, split: Split, limit: int | None = None) -> list[tuple[str, NDArray[np.uint8]]]:
    """(kind of file, bytes) of documents of a split, in order: all of them, or every n-th so as to come near `limit`.

    With a limit there are never more than `limit` bytes: the last document may be cut short, after a multiple of the
    corpus's grain. But there is always one document, an image as a whole. Raises DataError for a split without
    documents.

    Of a mixture, each source that has documents there gives its share of `limit`, one source after another.
    """
    total = corpus.bytes(split)
    if not total:
        raise DataError(f"the {split} split of {corpus.directory} is empty: too few documents to split")
    if isinstance(corpus, Corpora):
        held = [(share, part) for share, part in zip(corpus.shares, corpus.parts, strict=True) if part.bytes(split)]
        weights = [Fraction(share.weight) for share, _ in held]
        limits = [None] * len(held) if limit is None else largest_remainders(weights, limit)
        own = zip(held, limits, strict=True)
        return [found for (_, part), most in own if most != 0 for found in sample_evenly(part, split, most)]
    left = total if limit is None else limit
    step, passed = max(1, total // left), 0
    found: list[tuple[str, NDArray[np.uint8]]] = []
    for table in corpus.tables(split):
        for i in range(-passed % step, len(table), step):
            size = int(table.sizes[i])
            if size > left:
                size = max(left, 0 if found else corpus.grain) // corpus.grain * corpus.grain
            if size:
                kind = table.suffix_names[table.suffixes[i]] or "no suffix"
                found.append((kind, corpus.read(int(table.starts[i]), size)))
            left -= size
        passed += len(table)
    return found
