"""Sampling: from logits to the next id, independently of the rest of the batch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.bpe import Tokens
from bytelm.errors import CheckpointError, ConfigError
from bytelm.units import BYTES, EOS, UNWRITTEN, VOCAB

Reals = NDArray[Any]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Sampling:
    """Sampling options; None disables a filter.

    temperature: divides the logits; 0 is greedy (the most probable id, the lowest of equals).
    top_k: only the k most probable ids (lower ids first among equals).
    top_p: only the fewest most probable ids whose probabilities reach p together (nucleus sampling).
    min_p: only ids at least min_p times as likely as the most probable.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside its limits."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature} is not a finite number from 0 (greedy) up: try 0.8")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} leaves no id to choose: give 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is not in (0, 1]: try 0.9, or leave it out")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p {self.min_p} is not in [0, 1]: try 0.05, or leave it out")

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0 or self.top_k == 1

    def filtered(self, logits: Reals, allowed: Flags | None = None) -> NDArray[np.float64]:
        """The sampling distribution `[batch, vocab]`; each row sums to 1.

        In this order: only ids that may be generated, and of these only `allowed`; temperature; softmax; top_k; top_p
        of what top_k left, renormalised; min_p. Raises CheckpointError when a row's logits are not finite.
        """
        scores, best = _possible(logits, allowed)
        if self.greedy:
            return (np.arange(scores.shape[1]) == scores.argmax(-1)[:, None]).astype(np.float64)
        with np.errstate(over="ignore"):  # -inf, for a temperature next to nothing
            probabilities = np.exp((scores - best) / self.temperature)
        probabilities /= probabilities.sum(-1, keepdims=True)
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return probabilities
        order = np.argsort(-probabilities, axis=-1, kind="stable")
        ranked = np.take_along_axis(probabilities, order, -1)
        if self.top_k is not None:
            ranked[:, self.top_k :] = 0
        if self.top_p is not None:
            before = ranked.cumsum(-1) - ranked
            ranked[before >= self.top_p * ranked.sum(-1, keepdims=True)] = 0
        if self.min_p is not None:
            ranked[ranked < self.min_p * ranked[:, :1]] = 0
        np.put_along_axis(probabilities, order, ranked, -1)
        return probabilities / probabilities.sum(-1, keepdims=True)

    def choose(self, logits: Reals, keys: Keys, positions: Ints, allowed: Flags | None = None) -> Ints:
        """One id per row: greedy, or a sample that depends only on distribution, key and position. See `draw`."""
        if self.greedy:
            return _possible(logits, allowed)[0].argmax(-1)
        return draw(self.filtered(logits, allowed), keys, positions)


DEFAULT = Sampling()


def written(tokens: Tokens | None) -> Flags:
    """The ids that may be generated `[vocab]`: those that stand for bytes, and EOS."""
    sizes = np.arange(VOCAB) < BYTES if tokens is None else tokens.sizes > 0
    return sizes | (np.arange(len(sizes)) == EOS)


def _possible(logits: Reals, allowed: Flags | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits of ids that may be generated, -inf elsewhere, and the maximum of each row. Raises CheckpointError."""
    scores = np.where(True if allowed is None else allowed, logits.astype(np.float64), -np.inf)
    scores[:, UNWRITTEN] = -np.inf
    best = scores.max(-1, keepdims=True)
    if not np.isfinite(best).all():
        raise CheckpointError(
            f"the logits of the next byte peak at {best[~np.isfinite(best)][0]}, which is not finite: "
            "the weights are damaged or their training diverged; use an earlier checkpoint"
        )
    return scores, best


def logprobs(logits: Reals) -> NDArray[np.float64]:
    """log p of every id `[n, vocab]`, in nats, from logits: of the model itself, specials included."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def row_key(seed: int, row: int) -> int:
    """The random key of a row: 64 bits from (seed, row) alone, so that neighbouring seeds share no row."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest(), "little")


def uniform(keys: Keys, positions: Ints, ids: int = VOCAB) -> NDArray[np.float64]:
    """Uniform noise in (0, 1) for every id `[batch, ids]`, a function of key, position and id.

    A counter-based generator (as in Salmon et al. 2011), by SplitMix64's finaliser (Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        stream = _mixed(keys + _mixed(positions.astype(np.uint64) * _GOLDEN))
        mixed = _mixed(stream[:, None] + np.arange(1, ids + 1, dtype=np.uint64) * _GOLDEN)
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52 + 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(probabilities: NDArray[np.float64], keys: Keys, positions: Ints) -> Ints:
    """One id per row, never one of probability 0: an exponential race with the probabilities as rates (Gumbel-max).

    The noise belongs to (key, position, id) and not to the distribution. So two similar distributions
    sample the same id nearly always, which gives drafts a high acceptance rate (Gumbel-max coupling; ADR 0006).
    """
    with np.errstate(divide="ignore", over="ignore"):
        return (-np.log(uniform(keys, positions, probabilities.shape[1])) / probabilities).argmin(-1)
