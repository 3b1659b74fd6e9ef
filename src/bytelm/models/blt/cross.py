"""Cross-attention between bytes and the patches they make up (BLT paper, sections 3.2.2 and 3.3.1).

    encoder   each patch's k queries attend to the patch's own bytes          a softmax over each segment of bytes
    decoder   each byte attends to the k parts of the newest complete patch   a gather of k keys

so that both cost bytes × k, never bytes × patches. The published models add the residual twice, inside the module and
around it; so does this one, which returns 2x + attention.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.models.blt.pool import segment_max, segment_sum
from bytelm.nn.cross import CrossAttention


class PatchesFromBytes(CrossAttention):
    """The encoder's side: patches query their own bytes."""

    def forward(
        self,
        queries: Float[Tensor, "patches k dim"],
        bytes: Float[Tensor, "slots dim"],
        segment: Int[Tensor, " slots"],
    ) -> Float[Tensor, "patches k dim"]:
        """`segment`: the patch of each byte; the number of patches for bytes of none."""
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
        """`index`: the patch to which each byte attends."""
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
