"""Cross-attention between bytes and the patches they make up (BLT paper, sections 3.2.2 and 3.3.1).

    encoder   each patch's k queries attend the patch's own bytes      a softmax over each segment of bytes
    decoder   each byte attends the k parts of the newest whole patch  a gather of k keys

so that both cost bytes × k, never bytes × patches. The published models add the residual twice, once inside the
module and once around it; so does this one, which returns 2x + attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.nn import fused
from bytelm.nn.norm import RMSNorm
from bytelm.nn.pool import segment_max, segment_sum


class CrossAttention(nn.Module):
    """Queries and keys of one width, each side normed on its own, no positions, no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.scale = (dim // heads) ** -0.5

    def project(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[..., heads, head_dim]`."""
        split = (self.heads, -1)
        query = self.query(self.query_norm(queries)).unflatten(-1, split)
        key, value = self.key_value(self.key_norm(keys)).chunk(2, -1)
        return query, key.unflatten(-1, split), value.unflatten(-1, split)

    @staticmethod
    def fast(query: Tensor) -> Callable[..., Tensor] | None:
        """Attention between bytes and the patch each goes with as one pass, where there is a kernel for it."""
        if device := fused.kernels(query):
            return device.cross
        return fused.cross if fused.fits(query) else None


def flops(dim: int, queries: int, keys: int) -> int:
    """Operations of the matrix products of one cross-attention; its scores are no matrix products, but bytes × k."""
    return 2 * dim**2 * (2 * queries + 2 * keys)


class PatchesFromBytes(CrossAttention):
    """The encoder's side: patches query their own bytes."""

    def forward(
        self,
        queries: Float[Tensor, "patches k dim"],
        bytes: Float[Tensor, "slots dim"],
        segment: Int[Tensor, " slots"],
    ) -> Float[Tensor, "patches k dim"]:
        """`segment` says which patch each byte belongs to; the patch after the last is for bytes of none."""
        patches = len(queries)
        query, key, value = self.project(queries, bytes)
        if fast := self.fast(query):
            return 2 * queries + self.out(fast(query, key, value, segment).flatten(2))
        own = torch.cat([query, query.new_zeros((1, *query.shape[1:]))]).index_select(0, segment)
        scores = (own * key[:, None]).sum(-1).float() * self.scale  # [slots, k, heads]
        highest = segment_max(scores.detach(), segment, patches + 1)
        weights = (scores - highest.index_select(0, segment)).exp()
        total = segment_sum(weights, segment, patches + 1)
        weights = (weights / total.index_select(0, segment)).to(value.dtype)
        mixed = segment_sum(weights[..., None] * value[:, None], segment, patches + 1)[:-1]
        return 2 * queries + self.out(mixed.flatten(2))


class BytesFromPatches(CrossAttention):
    """The decoder's side: bytes query the parts of one patch each."""

    def forward(
        self,
        queries: Float[Tensor, "batch new dim"],
        patches: Float[Tensor, "batch patches k dim"],
        index: Int[Tensor, "batch new"],
    ) -> Float[Tensor, "batch new dim"]:
        """`index` says which patch each byte attends."""
        query, key, value = self.project(queries, patches)
        row = torch.arange(len(index), device=index.device)[:, None]
        flat = (row * patches.shape[1] + index).flatten()
        if fast := self.fast(query):
            mixed = fast(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), flat)
            return 2 * queries + self.out(mixed.view(queries.shape))
        shape = (*index.shape, *key.shape[2:])  # [batch, new, k, heads, head_dim]
        key = key.flatten(0, 1).index_select(0, flat).view(shape)
        value = value.flatten(0, 1).index_select(0, flat).view(shape)
        scores = (query[:, :, None] * key).sum(-1).float() * self.scale
        weights = scores.softmax(2).to(value.dtype)
        mixed = (weights[..., None] * value).sum(2)
        return 2 * queries + self.out(mixed.flatten(2))
