"""Scaling laws: curves through measured runs, by robust fits from many starts, with bootstrap intervals. NumPy alone.

Bits per byte L over training FLOPs C, after Hoffmann et al. 2022 (arXiv 2203.15556, approach 3):

    L(C) = E + A · (C / C0)^-alpha     E >= 0, alpha > 0     "offset": 4 budgets or more
    L(C) =     A · (C / C0)^-alpha                           "power": 3 budgets, which do not determine E

C0 is the geometric mean of the FLOPs measured. The Huber loss (delta 1e-3) of log L is minimised from a grid of starts.
The best size at each budget is the vertex of a parabola of log L in log size (approach 2), and follows a power law.

Intervals are a parametric bootstrap: new runs are drawn around the fit, and it is repeated on them. What is drawn is
in `Law.resampled`: "runs", each with noise, of the spread of all residuals; or "budgets", where the means of budgets
are further from the curve than runs of one budget are from each other (F test): all runs of a budget share its noise.
The spread itself is uncertain. Each draw scales it by sqrt(f / chi²(f)), f its degrees of freedom, as in Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

Array = NDArray[np.float64]
Groups = NDArray[np.int64]
Form = Literal["offset", "power"]
Interval = tuple[float, float]

DELTA = 1e-3  # of the Huber loss
DRAWS, LEVEL = 200, 0.95
SUSPECT, TRIALS = 0.25, 4000  # level of the F test, and how many ratios of noise it is compared with
WIDEST = 13.0  # times the spread: the 97.5 % point of Student's t with one degree of freedom
OFFSETS, EXPONENTS = (1e-3, 0.5, 0.8, 0.95), (0.03, 0.1, 0.3, 1.0)  # starts: E in the lowest bits measured, alpha
LOWEST = (math.log(1e-6), math.log(1e-3), math.log(1e-4))  # log E, log A, log alpha
HIGHEST = (math.log(20.0), math.log(1e3), math.log(4.0))
SETTLED = 1e-7  # relative gain at which a fit is done
FIRST, LAST = 1e-9, 1e6  # the least damping, and that at which a fit is done
KEPT = 2  # starts from which the Huber loss is minimised
NOTHING = 1e-3  # bits per byte: an offset below is 0
NEEDED: dict[Form, int] = {"offset": 4, "power": 3}  # budgets


@dataclass(frozen=True)
class Law:
    """A fitted L(C)."""

    form: Form
    offset: float
    """E, in bits per byte; 0 where `form` is "power"."""
    scale: float
    """A, in bits per byte."""
    exponent: float
    at: float
    """C0."""
    intervals: dict[str, Interval]
    """Of `scale`, `exponent` and, where it is fitted, `offset`: 95 %."""
    spread: float
    """Standard deviation of the log of bits, of one run or of one budget."""
    freedom: int
    """Its degrees of freedom."""
    resampled: Literal["runs", "budgets"]
    runs: int
    lowest: float
    """The smallest budget, in FLOPs."""
    highest: float
    draws: list[list[float]] = field(repr=False)
    """[draws, 4]: offset, scale, exponent and the factor of the spread."""

    def bits(self, flops: float) -> float:
        """Bits per byte at so many FLOPs."""
        return self.offset + self.scale * (flops / self.at) ** -self.exponent

    def interval(self, flops: float, runs: int | None = None) -> Interval:
        """The 95 % interval of the curve; with `runs`, of what the mean of so many new runs will be."""
        offset, scale, exponent, factor = np.array(self.draws, np.float64).T
        found = offset + scale * (flops / self.at) ** -exponent
        if runs is not None:
            of_mean = self.spread / math.sqrt(runs if self.resampled == "runs" else 1)
            found = found * np.exp(of_mean * factor * np.random.default_rng(1).standard_normal(len(found)))
        return central(found)

    def mapping(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "draws": [[float(f"{value:.6g}") for value in draw] for draw in self.draws]}

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Law:
        """The inverse of `mapping`. Raises KeyError, TypeError or ValueError for anything else."""
        intervals = {name: (float(low), float(high)) for name, (low, high) in mapping["intervals"].items()}
        fields: dict[str, Any] = {**mapping, "intervals": intervals}
        return cls(**fields)


def central(values: Float[Array, " draws"]) -> Interval:
    """The 95 % interval of draws."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def form_of(budgets: int) -> Form | None:
    """The form that so many budgets determine; None if they are too few for any."""
    return "offset" if budgets >= NEEDED["offset"] else "power" if budgets >= NEEDED["power"] else None


def fit_law(
    flops: Float[Array, " runs"], bits: Float[Array, " runs"], budget: Int[Groups, " runs"], draws: int = DRAWS
) -> Law:
    """The law of one model's runs; `budget`: the number of that of each, from 0. Raises ValueError for too few."""
    budgets = int(budget.max()) + 1
    form = form_of(budgets)
    if form is None:
        raise ValueError(f"{budgets} budgets: a scaling law needs {NEEDED['power']}")
    at = float(np.exp(np.log(flops).mean()))
    x, y = np.log(flops / at), np.log(bits)

    best = minimise(form, x, y[None], starts(form, x, y[None], OFFSETS, EXPONENTS))
    curve = predicted(form, best, x)[0][0]
    spread, freedom, resampled = spread_of(y - curve, budget, best.shape[-1])
    factor, noise = drawn(draws, budgets if resampled == "budgets" else len(x), freedom)
    noise = noise[:, budget] if resampled == "budgets" else noise
    data = curve + spread * noise
    begun = [np.repeat(best[:, None], draws, axis=0), starts(form, x, data, OFFSETS[1::2], EXPONENTS[::2])]
    again = minimise(form, x, data, np.concatenate(begun, axis=1))
    (offset, scale, exponent), sets = named(form, best)[0].tolist(), named(form, again)
    names = ("offset", "scale", "exponent")[0 if form == "offset" else 1 :]
    intervals = {name: central(sets[:, ("offset", "scale", "exponent").index(name)]) for name in names}
    low, high = (float(np.exp(np.log(flops[budget == edge]).mean())) for edge in (0, budgets - 1))
    table = np.column_stack([sets, factor]).tolist()
    fits = (form, offset, scale, exponent, at)
    return Law(*fits, intervals, spread, freedom, resampled, len(x), low, high, table)


def drawn(draws: int, units: int, freedom: int) -> tuple[Float[Array, " draws"], Float[Array, "draws units"]]:
    """The factor of the spread of each draw, and its noise in spreads, factor included."""
    generator = np.random.default_rng(0)
    factor = np.minimum(np.sqrt(freedom / generator.chisquare(freedom, draws)), WIDEST)
    return factor, factor[:, None] * generator.standard_normal((draws, units))


def spread_of(
    residuals: Float[Array, " runs"], budget: Int[Groups, " runs"], parameters: int
) -> tuple[float, int, Literal["runs", "budgets"]]:
    """The spread of residuals, its degrees of freedom, and whose it is: see the module."""
    count = np.bincount(budget)
    means = np.bincount(budget, residuals) / count
    within = float(((residuals - means[budget]) ** 2).sum())
    between = float((count * means**2).sum())
    of_budgets, of_runs = len(count) - parameters, len(residuals) - len(count)
    if of_runs and within:
        generator = np.random.default_rng(0)
        ratios = generator.chisquare(of_budgets, TRIALS) / of_budgets / (generator.chisquare(of_runs, TRIALS) / of_runs)
        if float((ratios >= between / of_budgets / (within / of_runs)).mean()) < SUSPECT:
            return math.sqrt(float((means**2).sum()) / of_budgets), of_budgets, "budgets"
    return math.sqrt((within + between) / (of_runs + of_budgets)), of_runs + of_budgets, "runs"


# --- the curves -------------------------------------------------------------------------------------------------------


def predicted(
    form: Form, theta: Float[Array, "fits parameters"], x: Float[Array, " runs"]
) -> tuple[Float[Array, "fits runs"], Float[Array, "fits runs parameters"]]:
    """The log of bits, and its derivatives; `theta`: log E (not of "power"), log A, log alpha; `x`: log C/C0."""
    scale, exponent = theta[:, -2, None], np.exp(theta[:, -1, None])
    decay = scale - exponent * x
    if form == "power":
        return decay, np.stack([np.ones_like(decay), -exponent * x], axis=-1)
    whole = np.logaddexp(theta[:, :1], decay)
    share = np.exp(decay - whole)
    return whole, np.stack([1 - share, share, -share * exponent * x], axis=-1)


def named(form: Form, theta: Float[Array, "fits parameters"]) -> Float[Array, "fits 3"]:
    """Offset, scale and exponent."""
    found = np.exp(theta)
    if form == "power":
        return np.column_stack([np.zeros(len(found)), found])
    found[:, 0] = np.where(found[:, 0] < NOTHING, 0.0, found[:, 0])
    return found


def starts(
    form: Form,
    x: Float[Array, " runs"],
    y: Float[Array, "fits runs"],
    offsets: tuple[float, ...],
    exponents: tuple[float, ...],
) -> Float[Array, "fits starts parameters"]:
    """A grid of starts; the scale is that which suits the others."""
    found: list[Array] = []
    for share, exponent in product(offsets if form == "offset" else (0.0,), exponents):
        offset = share * np.exp(y.min(axis=1))
        scale = (np.log(np.exp(y) - offset[:, None]) + exponent * x).mean(axis=1)
        rest = np.stack([scale, np.full_like(scale, math.log(exponent))], axis=1)
        found.append(rest if form == "power" else np.column_stack([np.log(offset), rest]))
    return np.stack(found, axis=1)


# --- minimisation -----------------------------------------------------------------------------------------------------


def minimise(
    form: Form,
    x: Float[Array, " runs"],
    y: Float[Array, "fits runs"],
    begun: Float[Array, "fits starts parameters"],
) -> Float[Array, "fits parameters"]:
    """The parameters of the least Huber loss of each fit, from the best of its starts.

    All starts are brought near by least squares; from the best few the Huber loss follows, its delta made smaller in
    steps, since near its end it is all but absolute values, whose corners hold a descent that begins far away.
    """
    fits, count, parameters = begun.shape
    near, loss = descend(form, x, np.repeat(y, count, axis=0), begun.reshape(-1, parameters), math.inf, 25)
    order = np.argsort(loss.reshape(fits, count), axis=1)[:, :KEPT]
    theta = np.take_along_axis(near.reshape(begun.shape), order[..., None], axis=1).reshape(-1, parameters)
    data = np.repeat(y, order.shape[1], axis=0)
    for delta, steps in ((10 * DELTA, 15), (3 * DELTA, 15), (DELTA, 200)):
        theta, loss = descend(form, x, data, theta, delta, steps)
    best = np.argmin(loss.reshape(fits, -1), axis=1)
    return theta.reshape(fits, -1, parameters)[np.arange(fits), best]


def huber(residuals: Float[Array, "fits runs"], delta: float) -> Float[Array, " fits"]:
    """The Huber loss; of an infinite delta half the sum of squares."""
    size = np.abs(residuals)
    inner = np.minimum(size, delta)
    return (inner * (size - inner / 2)).sum(axis=1)


def descend(
    form: Form,
    x: Float[Array, " runs"],
    y: Float[Array, "fits runs"],
    theta: Float[Array, "fits parameters"],
    delta: float,
    steps: int,
) -> tuple[Float[Array, "fits parameters"], Float[Array, " fits"]]:
    """Levenberg–Marquardt with iterated weights, all fits at once: parameters and their losses."""
    low, high = LOWEST[-theta.shape[1] :], HIGHEST[-theta.shape[1] :]
    theta = np.clip(theta, low, high)
    loss, damping = huber(y - predicted(form, theta, x)[0], delta), np.full(len(y), 1e-3)
    live = np.arange(len(y))  # fits that still gain
    for _ in range(steps):
        curve, slope = predicted(form, theta[live], x)
        residuals = y[live] - curve
        weighted = slope / np.maximum(np.abs(residuals) / delta, 1.0)[..., None]
        normal = np.einsum("frp,frq->fpq", weighted, slope)
        scale = np.maximum(np.einsum("fpp->fp", normal), 1e-12)
        normal += (damping[live, None] * scale)[..., None] * np.eye(theta.shape[1])
        step = np.linalg.solve(normal, np.einsum("frp,fr->fp", weighted, residuals)[..., None])[..., 0]
        tried = np.clip(theta[live] + np.clip(step, -2, 2), low, high)
        new = huber(y[live] - predicted(form, tried, x)[0], delta)
        better, gain = new < loss[live], loss[live] - new
        done = np.where(better, gain < SETTLED * loss[live], damping[live] > LAST)
        damping[live] = np.maximum(damping[live] * np.where(better, 0.25, 8.0), FIRST)
        theta[live[better]], loss[live[better]] = tried[better], new[better]
        live = live[~done]
        if not len(live):
            break
    return theta, loss
