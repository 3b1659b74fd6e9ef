"""Sums over documents, divided once (micro-average), with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelm.evaluate.bits import DocumentBits
from bytelm.units import bits_per_byte

AREA = 1 << 20  # documents that are drawn at once, which bounds the memory of resampling


@dataclass(frozen=True)
class Meter:
    """Nats and bytes, as sums. Adding meters is commutative, and associative up to the rounding of float64."""

    nats: float = 0.0
    bytes: int = 0

    @classmethod
    def of(cls, documents: Iterable[DocumentBits]) -> Meter:
        """The sums over documents, rounded once, so that their order does not matter."""
        documents = list(documents)
        return cls(math.fsum(d.nats for d in documents), sum(d.bytes for d in documents))

    def __add__(self, other: Meter) -> Meter:
        return Meter(self.nats + other.nats, self.bytes + other.bytes)

    @property
    def bits_per_byte(self) -> float:
        """The quotient. Raises ValueError if nothing was counted."""
        return bits_per_byte(self.nats, self.bytes)


def interval(
    documents: Iterable[DocumentBits], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """The confidence interval (low, high) of the bits per byte over documents.

    Percentile bootstrap: documents are drawn with replacement, since bytes of one document are not independent, and
    each draw is measured as a ratio of sums. With few documents it is too narrow. None with fewer than 2 documents
    that have bytes.
    """
    documents = [document for document in documents if document.bytes]
    if len(documents) < 2:
        return None
    nats = np.array([document.nats for document in documents])
    counts = np.array([document.bytes for document in documents])
    generator = np.random.default_rng(seed)
    rows = max(1, AREA // len(documents))
    ratios: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        draw = generator.integers(len(documents), size=(min(rows, resamples - start), len(documents)))
        ratios.append(nats[draw].sum(1) / counts[draw].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return bits_per_byte(float(low), 1), bits_per_byte(float(high), 1)
