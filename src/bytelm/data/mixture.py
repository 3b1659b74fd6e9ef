"""Weighted mixtures of sources: which window of which source a sample is, as a pure function of its number.

Samples come in blocks of 65,536. In each, every source has its exact share; where they are is a permutation of the
block's own:

    sample g    block g // 65,536, place g % 65,536; the permutation of (seed, block) takes the place to a slot
    slots       0 .......... n0 | .......... n0 + n1 | ...        source i has n_i of them
    window      of source i: those of earlier blocks + slot - the first slot of i

Nothing is counted while it trains: a resumed training, or another number of processes, draws the same samples.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate

import numpy as np

from bytelm.data.sampler import Batch, Sampler, permuted
from bytelm.errors import ConfigError, DataError
from bytelm.units import PAD

BLOCK = 1 << 16  # samples; a weight is exact to one of them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_ROUNDS = 6


@dataclass(frozen=True)
class Share:
    """A source of a mixture: its weight, and how often at most it is read through (None: as often as need be)."""

    name: str
    weight: float
    epochs: float | None = None

    @classmethod
    def parse(cls, text: str) -> Share:
        """A share such as "books=0.5", or "books=0.5@2" for two epochs at most. Raises ConfigError."""
        name, equals, rest = text.partition("=")
        weight, limited, epochs = rest.partition("@")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"mix: {text!r} is no NAME=WEIGHT: name it in up to 64 letters, digits, - and _")
        return cls(name, _positive(text, weight), _positive(text, epochs) if limited else None)


def _positive(text: str, number: str) -> float:
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(f"mix: {text!r}: {number!r} must be a number above 0, as in books=0.5 or books=0.5@2")
    return found


def shares_of(texts: Sequence[str]) -> tuple[Share, ...]:
    """The shares of a mixture. Raises ConfigError for one that is malformed, repeated, or too small to be exact."""
    shares = tuple(map(Share.parse, texts))
    names, total = [share.name for share in shares], sum(Fraction(share.weight) for share in shares)
    for share in shares:
        if names.count(share.name) > 1:
            raise ConfigError(f"mix: {share.name} is there {names.count(share.name)} times: give each source once")
        if Fraction(share.weight) * BLOCK < total:
            raise ConfigError(
                f"mix: {share.name} = {share.weight:g} is {float(Fraction(share.weight) / total):.2g} of the mixture, "
                f"and the least is 1 in {BLOCK:,}: raise it, or leave it out"
            )
    return shares


@dataclass(frozen=True)
class Period:
    """Consecutive blocks of the same shares; `blocks` is None where they go on for ever."""

    block: int
    """The first of them."""
    blocks: int | None
    counts: tuple[int, ...]
    """Samples of each source in a block."""
    used: tuple[int, ...]
    """Windows of each source in the blocks before."""
    firsts: tuple[int, ...]
    """The first slot of each source."""
    size: int
    """Samples of a block: fewer in the last one alone."""


def largest_remainders(weights: Sequence[Fraction], count: int) -> list[int]:
    """`count` dealt out in proportion: each gets its share rounded down, the largest remainders (first ones) one more.

    Where all weights are 0, so are the numbers.
    """
    total = sum(weights)
    if not total:
        return [0] * len(weights)
    exact = [weight * count / total for weight in weights]
    found = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in order[: count - sum(found)]:
        found[i] += 1
    return found


def dealt(weights: Sequence[Fraction], left: Sequence[int | None], size: int) -> list[int]:
    """The samples of each source in a block of `size`: no more than it has `left`; the others share the rest."""
    found, full = [0] * len(weights), [remaining == 0 for remaining in left]
    while True:
        open_weights = [Fraction(0) if is_full else weight for weight, is_full in zip(weights, full, strict=True)]
        shares = largest_remainders(open_weights, size - sum(found))
        over = [(i, most) for i, most in enumerate(left) if most is not None and not full[i] and shares[i] > most]
        if not over:
            return [own + share for own, share in zip(found, shares, strict=True)]
        for i, most in over:
            found[i], full[i] = most, True


def periods(weights: Sequence[Fraction], limits: Sequence[int | None], size: int) -> list[Period]:
    """All periods of blocks of `size`, from block 0 on; `limits`: the windows that each source gives at the most."""
    found: list[Period] = []
    block, used = 0, [0] * len(weights)
    while True:
        left = [None if limit is None else limit - n for limit, n in zip(limits, used, strict=True)]
        counts = dealt(weights, left, size)
        if not sum(counts):
            return found
        # As many blocks as have these counts: all for which what is left is enough, and at least this one.
        whole = [have // n for have, n in zip(left, counts, strict=True) if have is not None and n]
        blocks = max(1, min(whole)) if whole else None
        firsts = [0, *accumulate(counts)]
        found.append(Period(block, blocks, tuple(counts), tuple(used), tuple(firsts[:-1]), firsts[-1]))
        if blocks is None:
            return found
        block += blocks
        used = [before + blocks * n for before, n in zip(used, counts, strict=True)]


@lru_cache(16)
def _keys(seed: int, block: int) -> list[int]:
    """Pseudo-random 64-bit numbers from (seed, block)."""
    digest = blake2b(f"mixture {seed} {block}".encode(), digest_size=8 * _ROUNDS).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]


class Mixture:
    """Batches of windows of several sources, each in its exact share: a `Sampler` of samplers.

    Within a source the windows follow each other as its `Sampler` has them: each once in an epoch. A source with
    `epochs` gives floor(epochs * windows) windows, at least one, and no more: in the block in which they run out, and
    after it, the others have its share in proportion. When no source has any left, the mixture ends (`samples`).
    """

    def __init__(
        self,
        shares: Sequence[Share],
        samplers: Sequence[Sampler],
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        size: int = BLOCK,
    ) -> None:
        """`batch` windows a step on each of `world` ranks; a sampler for each share, all of the same window.

        `size`: samples of a block.
        """
        if batch < 1 or not 0 <= rank < world or len(shares) != len(samplers) or not shares:
            raise ValueError(f"no mixture of {len(samplers)} samplers with batch={batch}, rank={rank}, world={world}")
        self.shares, self.samplers = tuple(shares), tuple(samplers)
        self._batch, self._seed, self._rank, self._world = batch, seed, rank, world
        limits = [
            None if share.epochs is None else max(1, math.floor(Fraction(share.epochs) * sampler.windows))
            for share, sampler in zip(shares, samplers, strict=True)
        ]
        self._periods = periods([Fraction(share.weight) for share in shares], limits, size)
        self._size = size
        self._blocks = [period.block for period in self._periods]
        self.ids = sum(sampler.ids for sampler in samplers)  # ids of one epoch of every source
        self.windows = sum(sampler.windows for sampler in samplers)  # windows of one epoch of every source
        self.samples = None if any(limit is None for limit in limits) else sum(limit or 0 for limit in limits)
        """The samples there are; None without an end."""

    @property
    def elsewhere(self) -> bool:
        """See `Windows`."""
        return any(sampler.elsewhere for sampler in self.samplers)

    @property
    def steps(self) -> int | None:
        """The steps that the samples are enough for; None without an end. Those that fill no step are left."""
        return None if self.samples is None else self.samples // (self._batch * self._world)

    def drawn(self, sample: int) -> tuple[int, int]:
        """(source, number of its sample) of a sample. Raises DataError past the last one."""
        if self.samples is not None and sample >= self.samples:
            raise DataError(
                f"all sources of the mixture are used up after {self.samples:,} windows: allow more epochs, as in "
                f"{self.shares[0].name}=...@{(self.shares[0].epochs or 1) * 2:g}"
            )
        block, place = divmod(sample, self._size)
        period = self._periods[bisect_right(self._blocks, block) - 1]
        slot = permuted(place, period.size, _keys(self._seed, block))
        source = bisect_right(period.firsts, slot) - 1
        while not period.counts[source]:  # of no slots, where the next one begins too
            source -= 1
        earlier = period.used[source] + (block - period.block) * period.counts[source]
        return source, earlier + slot - period.firsts[source]

    def batch(self, step: int) -> Batch:
        """The batch of this rank at a step, from 0 on. Raises DataError past the last sample."""
        first = (step * self._world + self._rank) * self._batch
        shape = (self._batch, self.samplers[0].window + 1)
        ids = np.full(shape, PAD, np.int64)
        boundaries = np.zeros(shape, bool) if self.samplers[0].recorded else None
        for row in range(self._batch):
            source, number = self.drawn(first + row)
            self.samplers[source].write(number, ids[row], None if boundaries is None else boundaries[row])
        return Batch(ids, boundaries)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0 on, of the source read most often before a step begins."""
        first = step * self._world * self._batch
        block = first // self._size
        period = self._periods[bisect_right(self._blocks, block) - 1]
        used = [b + (block - period.block) * n for b, n in zip(period.used, period.counts, strict=True)]
        for sample in range(block * self._size, first):
            used[self.drawn(sample)[0]] += 1
        return max(n // sampler.windows for n, sampler in zip(used, self.samplers, strict=True))


@dataclass(frozen=True)
class HeldOut:
    """Validation windows of the sources that have some, each on its own."""

    sources: dict[str, tuple[float, Sampler]]
    """(weight, windows) by name."""

    def mean(self, score: Callable[[Sampler], float | None]) -> tuple[float | None, dict[str, float]]:
        """The mean, by weight, of the score of each source, and all of them by name; (None, {}) if one has none."""
        found = dict[str, float]()
        for name, (_, windows) in self.sources.items():
            value = score(windows)
            if value is None:
                return None, {}
            found[name] = value
        total = math.fsum(weight for weight, _ in self.sources.values())
        return math.fsum(self.sources[name][0] * value for name, value in found.items()) / total, found
