"""Dynamic chunking of H-Net (Hwang et al. 2025, arXiv 2507.07955, section 2.2): a model learns where patches begin.

    positions      T    h    e    _    c    a    t     encoder outputs x
    probability   1.0   .1   .2   .7   .6   .1   .3    half of 1 - cos(W_q x_t, W_k x_t-1)
    opens          1    0    0    1    1    0    0     at .5 and above; the first of a document always
    chunks         x_T            x__  x_c             only these enter the inner network
    outputs        z0   z0   z0   z1   z2   z2   z2    smoothed by the probabilities, then read by each position

A decision needs the positions up to its own, so that what opens a chunk is known when it has been read.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.nn.products import Linear
from bytelm.nn.sharded import rows_here
from bytelm.transfer import to_device

REACH = 64  # chunks: what is further back is smoothed away, below 2^-64


class Router(nn.Module):
    """The probability that a position opens a chunk, from how little it resembles the one before."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Both projections are the identity."""
        for part in (self.query, self.key):
            first, held = rows_here(part.weight)
            held.copy_(torch.eye(*part.weight.shape)[first : first + len(held)])

    def forward(
        self, x: Float[Tensor, "batch new dim"], starts: Bool[Tensor, "batch new"], before: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch new"], Float[Tensor, "batch new dim"]]:
        """Probabilities, 1 where `starts`, and the keys of all positions; `before`: the key of the position before.

        Not in bfloat16, even under autocast: a boundary is decided in float32.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.query.weight.dtype)
            query, key = precise(self.query(x)), precise(self.key(x))
            previous = torch.cat([before[:, None].to(key.dtype), key[:, :-1]], 1)
            probability = (1 - F.cosine_similarity(query, previous, -1)).clamp(0, 2) / 2
        return probability.masked_fill(to_device(starts, x), 1.0), key


def precise(x: Tensor) -> Tensor:
    """In float32, or float64 if it was."""
    return x if x.dtype == torch.float64 else x.float()


def smoothed(
    chunks: Float[Tensor, "batch chunks dim"],
    chance: Float[Tensor, "batch chunks"],
    starts: Bool[Tensor, "batch chunks"],
    before: Float[Tensor, "batch dim"],
) -> Float[Tensor, "batch chunks dim"]:
    """z_t = P_t chunk_t + (1 - P_t) z_t-1, from z = `before` (the paper's smoothing module), in parallel.

    By doubling distances (Hillis and Steele 1986). As P is at least .5, distances below REACH are all that matter.
    Where a document starts, nothing is left of what was before it.
    """
    share = chance[..., None]
    mixed, left = share * precise(chunks), (1 - share).masked_fill(to_device(starts, share)[..., None], 0.0)
    first = mixed[:, :1] + left[:, :1] * before[:, None].to(mixed.dtype)
    mixed = torch.cat([first, mixed[:, 1:]], 1)
    distance = 1
    while distance < min(chunks.shape[1], REACH):
        further = mixed[:, distance:] + left[:, distance:] * mixed[:, :-distance]
        left = torch.cat([left[:, :distance], left[:, distance:] * left[:, :-distance]], 1)
        mixed = torch.cat([mixed[:, :distance], further], 1)
        distance *= 2
    return mixed


def straight_through(confidence: Tensor) -> Tensor:
    """1, with the gradient of `confidence` (Bengio et al. 2013)."""
    return confidence + (1 - confidence).detach()


def ratio_loss(
    probability: Float[Tensor, "batch new"],
    opens: Bool[Tensor, "batch new"],
    real: Bool[Tensor, "batch new"],
    target: float,
) -> Float[Tensor, " batch"]:
    """The ratio loss of each row for a `target` length N: N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)).

    F is the fraction of positions that open a chunk, G the mean probability; 1 where both are 1 / N; 0 of an empty row.
    """
    count = real.sum(1).clamp(min=1)
    fraction = opens.sum(1) / count
    mean = (probability * real).sum(1) / count
    loss = target / (target - 1) * ((target - 1) * fraction * mean + (1 - fraction) * (1 - mean))
    return loss * real.any(1)


def gathered(x: Float[Tensor, "batch slots dim"], index: Int[Tensor, "batch some"]) -> Float[Tensor, "batch some dim"]:
    """Some slots of each row."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, to_device(index, x)]
