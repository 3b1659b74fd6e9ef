"""The n-gram entropy model against its formula, written out with dictionaries."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from bytelm.models.ngram.entropy_model import UNSEEN, Config, NgramEntropyModel, keys
from bytelm.units import BYTES, PAD

ORDER, ROWS = 3, (1 << 20) - 3  # in which no two contexts of these documents share a row
DOCUMENTS = [b"the cat sat on the mat, the hat and the cat", b"", b"a", bytes(range(256)) * 2]


def test_entropies_are_those_of_the_formula() -> None:
    """Witten and Bell's smoothing with the suffix, of contexts that were seen; all other rows are unused."""
    model = NgramEntropyModel(Config(order=ORDER, rows=ROWS))
    model.count([np.frombuffer(document, np.uint8) for document in DOCUMENTS])
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for document in DOCUMENTS:
        padded = [*[PAD] * ORDER, *document]
        for at, byte in enumerate(document, ORDER):
            for length in range(1, ORDER + 1):
                counts[tuple(reversed(padded[at - length : at]))][byte] += 1  # the newest id first
    chances: dict[tuple[int, ...], np.ndarray] = {(): np.full(BYTES, 1 / BYTES)}
    rows: list[set[int]] = [set() for _ in range(ORDER)]
    for context in sorted(counts, key=len):
        found = np.array([counts[context][byte] for byte in range(BYTES)], np.float64)
        kinds = np.count_nonzero(found)
        chances[context] = (found + kinds * chances[context[:-1]]) / (found.sum() + kinds)
        row = int(keys(torch.tensor([context]), ROWS)[0])
        assert row not in rows[len(context) - 1], "two contexts in one row: choose more rows"
        rows[len(context) - 1].add(row)
        wanted = -sum(chance * np.log(chance) for chance in chances[context])
        assert float(model.tables[len(context) - 1, row]) == pytest.approx(wanted, rel=1e-5)
    for table, used in zip(model.tables, rows, strict=True):
        assert int((table != UNSEEN).sum()) == len(used) > 30
