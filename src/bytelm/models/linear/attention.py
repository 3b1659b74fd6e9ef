"""Causal linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 9-20), one definition for both its forms.

    out_t = Σ_{s ≤ t} (R_t φ(q_t) · R_s φ(k_s)) v_s / Σ_{s ≤ t} φ(q_t) · φ(k_s)         φ(x) = elu(x) + 1

R rotates features by their position, in the numerator only (RoFormer, arXiv 2104.09864, eq. 19). The recurrent form
needs two sums over all positions before t, S = Σ R φ(k) vᵀ and z = Σ φ(k), which are the state. The parallel form goes
in chunks: products of queries and keys within a chunk, the sums for the chunks before; one id is a chunk of one.

    chunk 0          chunk 1          chunk 2
    q kᵀ v ── S, z ─▶ q kᵀ v + q S ── S, z ─▶ q kᵀ v + q S           cost: positions × (chunk + head_dim) × dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from bytelm.nn.attention import RowPositions
from bytelm.nn.rope import Rotation, rotate, rotation
from bytelm.transfer import HOST, to_device

CHUNK = 64  # positions per chunk
STRETCH = 64  # chunks whose sums are combined in one product
LEAST = 1e-6  # lower bound of the denominator


def flops(dim: int, heads: int, new: int) -> int:
    """FLOPs of the matmuls of one layer's attention over `new` positions read at once."""
    width = min(CHUNK, new)
    chunks = -(-new // width) if new else 0
    stretches = [STRETCH] * (chunks // STRETCH) + [chunks % STRETCH] * (chunks % STRETCH > 0)
    sums = sum((stretch + 1) ** 2 for stretch in stretches) * (dim // heads + 1)
    return 2 * dim * (chunks * width * (3 * width + 2 * dim // heads) + sums)


@dataclass(frozen=True)
class Sums:
    """The state of a layer, of constant size."""

    products: Float[Tensor, "batch heads head_dim head_dim"]
    """S: keys by values."""
    keys: Float[Tensor, "batch heads head_dim"]
    """z."""

    @classmethod
    def zero(cls, batch: int, heads: int, head_dim: int, device: torch.device) -> Sums:
        """The sums of an empty document."""
        return cls(
            torch.zeros(batch, heads, head_dim, head_dim, device=device),
            torch.zeros(batch, heads, head_dim, device=device),
        )


@dataclass(frozen=True)
class LinearView:
    """An `AttentionPattern` whose memory is `Sums`, derived once and shared by all layers."""

    document: Int[Tensor, "batch new"]
    """Documents started at or before each position; 0 continues the one read before."""
    lengths: Int[Tensor, " batch"]
    rotation: Rotation
    """No rotation: features are rotated instead of queries and keys."""
    turn: Rotation
    after: RowPositions

    @classmethod
    def of(
        cls,
        lengths: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        where: RowPositions,
        head_dim: int,
        theta: float,
        device: torch.device = HOST,
    ) -> LinearView:
        """Derive the view. `starts` marks the new positions at which a document starts."""
        positions, _, after = where.read(lengths, starts)
        turn = rotation(to_device(positions, device), head_dim, theta)
        still = torch.ones_like(turn[0]), torch.zeros_like(turn[1])
        return cls(to_device(starts.long().cumsum(1), device), to_device(lengths, device), still, turn, after)

    def attend(
        self,
        query: Float[Tensor, "batch new heads head_dim"],
        keys: Float[Tensor, "batch new heads head_dim"],
        values: Float[Tensor, "batch new heads head_dim"],
        cache: Sums | None,
    ) -> tuple[Float[Tensor, "batch new heads head_dim"], Sums | None]:
        """The attention outputs, and the sums after them, in float32 or more."""
        batch, new, heads, head_dim = query.shape
        kind = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            sums = cache or Sums.zero(batch, heads, head_dim, query.device)
            if not new:
                return query, cache
            mixed, sums = self.over(query.to(kind), keys.to(kind), values.to(kind), sums)
        return mixed.to(query.dtype), sums if cache is not None else None

    def over(self, query: Tensor, keys: Tensor, values: Tensor, sums: Sums) -> tuple[Tensor, Sums]:
        """`attend` in one dtype, on `[batch, chunks, width, ...]`."""
        new = query.shape[1]
        width = min(CHUNK, new)
        spare = -new % width

        def chunked(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, spare))
            return x.unflatten(1, (-1, width))

        q, k = F.elu(query) + 1, F.elu(keys) + 1
        slots = torch.arange(new, device=query.device)
        real = chunked(slots < self.lengths[:, None])
        document = chunked(self.document)
        q_turned, k_turned, q, k, v = map(chunked, (rotate(q, self.turn), rotate(k, self.turn), q, k, values))
        # Of the documents in a chunk, only the last one continues after it.
        last = torch.where(real, document, -1).amax(2)
        last = torch.cat([torch.zeros_like(last[:, :1]), last], 1).cummax(1).values  # [batch, 1 + chunks]
        going = ((document == last[:, 1:, None]) & real).to(k.dtype)[..., None, None]
        products = torch.einsum("bcshd,bcshe->bchde", k_turned * going, v)
        totals = (k * going).sum(2)
        goes_on = (last[:, 1:] == last[:, :-1]).to(k.dtype)
        s, z, sums = self.running(products, totals, goes_on, sums)

        carried = (document == last[:, :-1, None]).to(k.dtype)[..., None]
        order = torch.arange(width, device=query.device)
        seen = (document[..., None] == document[..., None, :]) & (order[:, None] >= order)
        seen = seen[:, :, None].to(k.dtype)
        weights = torch.einsum("bcthd,bcshd->bchts", q_turned, k_turned) * seen
        mixed = torch.einsum("bchts,bcshd->bcthd", weights, v)
        mixed = mixed + torch.einsum("bcthd,bchde->bcthe", q_turned, s) * carried[..., None]
        amount = (torch.einsum("bcthd,bcshd->bchts", q, k) * seen).sum(-1).transpose(2, 3)
        amount = amount + (q * z[:, :, None]).sum(-1) * carried
        mixed = mixed / amount.clamp(min=LEAST)[..., None]
        return mixed.flatten(1, 2)[:, :new], sums

    @staticmethod
    def running(products: Tensor, totals: Tensor, goes_on: Tensor, sums: Sums) -> tuple[Tensor, Tensor, Sums]:
        """S and z before each chunk `[batch, chunks, ...]`, and after the last."""
        s, z = sums.products.to(products.dtype), sums.keys.to(totals.dtype)
        before: list[tuple[Tensor, Tensor]] = []
        for part, total, on in zip(*(x.split(STRETCH, 1) for x in (products, totals, goes_on)), strict=True):
            weights = reach(on)
            all_s, all_z = recur(weights, s, part), recur(weights, z, total)
            before.append((all_s[:, :-1], all_z[:, :-1]))
            s, z = all_s[:, -1], all_z[:, -1]
        s_before, z_before = (torch.cat(x, 1) for x in zip(*before, strict=True))
        return s_before, z_before, Sums(s, z)


def reach(goes_on: Float[Tensor, "batch chunks"]) -> Float[Tensor, "batch later earlier"]:
    """1 if the state before a chunk, or its own sum, carries over to a later one; 0 if a chunk between resets it."""
    resets = F.pad(1 - goes_on, (1, 0)).cumsum(1)
    return (resets[:, :, None] == resets[:, None]).to(goes_on.dtype).tril()


def recur(
    weights: Float[Tensor, "batch later earlier"], first: Float[Tensor, "batch ..."], added: Tensor
) -> Float[Tensor, "batch later ..."]:
    """The recurrence s[0] = first, s[i + 1] = goes_on[i] · s[i] + added[i], as one matrix product.

    As a loop it would be thousands of launches on a device, and its backward pass quadratic.
    """
    return torch.einsum("bij,bj...->bi...", weights, torch.cat([first[:, None], added], 1))
