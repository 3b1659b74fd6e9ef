"""From logits to the next id: the distribution that is sampled, and a draw from it that no batch mate can change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from bytelm.errors import CheckpointError, ConfigError
from bytelm.units import BYTES, EOS, VOCAB


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen from the logits; None leaves a filter out.

    temperature: divides the logits; 0 is greedy (the likeliest id, the lowest of equals).
    top_k: only the k likeliest ids (lower ids first among equals).
    top_p: only the fewest likeliest ids whose probabilities reach p together (nucleus sampling).
    min_p: only ids at least min_p times as likely as the likeliest.
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

    def filtered(
        self, logits: Float[Tensor, "batch vocab"], allowed: Bool[Tensor, "batch vocab"] | None = None, eos: bool = True
    ) -> Float64[Tensor, "batch vocab"]:
        """The probabilities (float64, on the CPU) that the next id is drawn from; each row sums to 1.

        In this order: only the 256 bytes and, with `eos`, EOS, and of them only `allowed` (on the CPU); temperature;
        softmax; top_k; top_p of what top_k left, renormalised; min_p. Raises CheckpointError when a row's logits are
        not finite.
        """
        possible = _written(eos) if allowed is None else _written(eos) & allowed
        scores = logits.cpu().double().masked_fill(~possible, -math.inf)
        best = scores.amax(-1, keepdim=True)
        if not bool(best.isfinite().all()):
            raise CheckpointError(
                f"the logits of the next byte peak at {best[~best.isfinite()][0].item()}, which is not finite: "
                "the weights are damaged or their training diverged; use an earlier checkpoint"
            )
        probabilities = torch.softmax((scores - best) / (self.temperature or 1.0), dim=-1)
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        top_k = self.top_k if self.temperature else 1
        if top_k is not None:
            ranked[:, top_k:] = 0
        if self.top_p is not None:
            before = ranked.cumsum(-1) - ranked
            ranked = ranked.masked_fill(before >= self.top_p * ranked.sum(-1, keepdim=True), 0)
        if self.min_p is not None:
            ranked = ranked.masked_fill(ranked < self.min_p * ranked[:, :1], 0)
        kept = torch.zeros_like(ranked).scatter(-1, order, ranked)
        return kept / kept.sum(-1, keepdim=True)


DEFAULT = Sampling()


def _written(eos: bool) -> Bool[Tensor, " vocab"]:
    """The ids that are ever generated: PAD, BOS and RESERVED are not."""
    ids = torch.arange(VOCAB)
    return (ids < BYTES) | ((ids == EOS) & eos)


def generators(seed: int, rows: int) -> list[torch.Generator]:
    """One generator a row (on the CPU), seeded from (seed, row) alone, so that neighbouring seeds share no row."""

    def one(row: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    return [one(row) for row in range(rows)]


def draw(probabilities: Float64[Tensor, "batch vocab"], generators: Sequence[torch.Generator]) -> Int[Tensor, " batch"]:
    """One id a row, never one of probability 0: the inverse of the cumulated probabilities at one uniform number.

    Each row takes its number from its own generator, so that what it draws depends on nothing but itself.
    """
    uniform = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])
    cumulated = probabilities.cumsum(-1)
    # uniform <= 1 - 2**-53, so that the product, even rounded, is below the total: the id found has a probability.
    return (cumulated <= uniform * cumulated[:, -1:]).sum(-1)
