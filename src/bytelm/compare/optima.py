"""The best size at each budget, and its power law over budgets: Hoffmann et al. 2022 (arXiv 2203.15556), approach 2.

A size x is a model's non-embedding parameters, or its bytes per patch. At each budget a parabola of log bits in log x
goes through the runs of all sizes; its vertex is the optimum if it is a minimum between the smallest and the largest
size. Otherwise the optimum is not known: the better edge is reported as such, and left out of the power law. Intervals:
parametric bootstrap over runs, as in `fitting`; in a draw, a vertex outside the sizes counts as the better edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from bytelm.compare.fitting import DRAWS, Array, Interval, central, drawn

SIZES = 3  # that a parabola needs
SAME = 1.01  # ratio up to which two sizes are one

Place = Literal["inside", "smallest", "largest"]


@dataclass(frozen=True)
class Sizes:
    """The runs at one budget. `bytes`: what each was trained on."""

    flops: float
    sizes: Float[Array, " runs"]
    bits: Float[Array, " runs"]
    bytes: Float[Array, " runs"]

    @property
    def different(self) -> int:
        """How many sizes there are."""
        ordered = np.sort(self.sizes)
        return 1 + int((ordered[1:] > SAME * ordered[:-1]).sum())


@dataclass(frozen=True)
class Minimum:
    """The best size at one budget: of the parabola if `place` is "inside", else the edge of those tried."""

    flops: float
    place: Place
    size: float
    interval: Interval | None
    """None at an edge, and where no run is left to measure the spread with."""
    bits: float
    bytes: float
    """Training bytes at this size: interpolated between those of the sizes tried."""
    tried: Interval


@dataclass(frozen=True)
class Optimum:
    """The best size over budgets: `scale` · (C / `at`)^`exponent`, None with fewer than two budgets inside."""

    minima: list[Minimum]
    scale: float | None
    exponent: float | None
    at: float | None
    interval: Interval | None
    """Of the exponent."""

    def size(self, flops: float) -> float | None:
        """The best size at so many FLOPs."""
        if self.scale is None or self.exponent is None or self.at is None:
            return None
        return self.scale * (flops / self.at) ** self.exponent

    def mapping(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def vertices(
    x: Float[Array, " runs"], y: Float[Array, "fits runs"]
) -> tuple[Float[Array, " fits"], Float[Array, "fits 3"], Float[Array, "fits runs"]]:
    """Vertices of parabolas of y in x, moved to the better edge where they are none or outside; with coefficients and
    fitted values."""
    middle = x.mean()
    design = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], axis=1)
    coefficients = y @ np.linalg.pinv(design).T
    edges = np.array([x.min(), x.max()])
    at_edges = coefficients @ np.stack([np.ones(2), edges - middle, (edges - middle) ** 2])
    edge = edges[np.argmin(at_edges, axis=1)]
    curved = coefficients[:, 2] > 0
    vertex = middle - coefficients[:, 1] / (2 * np.where(curved, coefficients[:, 2], 1.0))
    inside = curved & (vertex > edges[0]) & (vertex < edges[1])
    return np.where(inside, vertex, edge), coefficients, coefficients @ design.T


def optimum(budgets: Sequence[Sizes], draws: int = DRAWS) -> Optimum | None:
    """The optimum of the budgets with three sizes or more, in order; None if there are none."""
    wanted = [one for one in budgets if one.different >= SIZES]
    if not wanted:
        return None
    fits = [vertices(np.log(one.sizes), np.log(one.bits)[None]) for one in wanted]
    residuals = [np.log(one.bits) - curve[0] for one, (_, _, curve) in zip(wanted, fits, strict=True)]
    freedom = sum(len(one) - 3 for one in residuals)
    redrawn: Array | None = None
    if freedom:
        spread = float(np.sqrt(sum(float((one**2).sum()) for one in residuals) / freedom))
        _, noise = drawn(draws, sum(map(len, residuals)), freedom)
        parts = np.split(noise * spread, np.cumsum([len(one) for one in residuals])[:-1], axis=1)
        each = [
            vertices(np.log(one.sizes), curve + part)[0]
            for one, (_, _, curve), part in zip(wanted, fits, parts, strict=True)
        ]
        redrawn = np.stack(each, axis=1)
    minima = [
        minimum(one, float(fit[0][0]), fit[1][0], None if redrawn is None else redrawn[:, index])
        for index, (one, fit) in enumerate(zip(wanted, fits, strict=True))
    ]
    return trend(minima, redrawn)


def minimum(
    runs: Sizes, vertex: float, coefficients: Float[Array, " 3"], redrawn: Float[Array, " draws"] | None
) -> Minimum:
    """What is known of one budget; `vertex`: log size."""
    x = np.log(runs.sizes)
    low, high = float(x.min()), float(x.max())
    place: Place = "inside" if low < vertex < high else "smallest" if vertex <= low else "largest"
    away = vertex - x.mean()
    order = np.argsort(x)
    bytes = float(np.exp(np.interp(vertex, x[order], np.log(runs.bytes)[order])))
    interval = central(np.exp(redrawn)) if redrawn is not None and place == "inside" else None
    bits = float(np.exp(coefficients @ np.array([1.0, away, away**2])))
    tried = (float(np.exp(low)), float(np.exp(high)))
    return Minimum(runs.flops, place, float(np.exp(vertex)), interval, bits, bytes, tried)


def trend(minima: list[Minimum], redrawn: Float[Array, "draws budgets"] | None) -> Optimum:
    """The power law through the minima that are inside."""
    inside = [index for index, one in enumerate(minima) if one.place == "inside"]
    if len(inside) < 2:
        return Optimum(minima, None, None, None, None)
    c = np.log([minima[index].flops for index in inside])
    slope = (c - c.mean()) / ((c - c.mean()) ** 2).sum()
    sizes = np.log([minima[index].size for index in inside])
    exponents = None if redrawn is None else central(redrawn[:, inside] @ slope)
    return Optimum(minima, float(np.exp(sizes.mean())), float(sizes @ slope), float(np.exp(c.mean())), exponents)
