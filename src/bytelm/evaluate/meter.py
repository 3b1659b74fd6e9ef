"""Sums over documents, divided once (micro-average), with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bytelm.evaluate.bits import DocumentBits
from bytelm.units import bits_per_byte

AREA = 1 << 20  # sums of units that are drawn at once, which bounds the memory of resampling


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
    """The confidence interval (low, high) of the bits per byte over documents: see `bootstrap`.

    None with fewer than 2 documents that have bytes.
    """
    sums = np.array([(document.nats, document.bytes) for document in documents if document.bytes], np.float64)
    if len(sums) < 2:
        return None
    low, high = bootstrap(sums, lambda drawn: drawn[:, :1] / drawn[:, 1:], level, resamples, seed)[:, 0]
    return bits_per_byte(float(low), 1), bits_per_byte(float(high), 1)


def bootstrap(
    sums: Float[NDArray[np.float64], "units columns"],
    figures: Callable[[Float[NDArray[np.float64], "draws columns"]], Float[NDArray[np.float64], "draws figures"]],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Float[NDArray[np.float64], "2 figures"]:
    """The bounds, low and high, of figures that follow from sums over units.

    Percentile bootstrap: units (documents, say) are drawn with replacement, since bytes of one document are not
    independent, and each draw is measured by `figures` as a whole: as ratios of sums, and what they differ by. With few
    units it is too narrow. A draw in which a figure is not a number does not count for it.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, AREA // max(1, sums.size))
    found: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        draw = generator.integers(len(sums), size=(min(rows, resamples - start), len(sums)))
        found.append(figures(sums[draw].sum(1)))
    return np.nanquantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
