"""Transformer blocks with token shift, as MEGABYTE-pytorch stacks them.

    x          a a'   b b'   c c'        the halves of three vectors, the first of which starts a document
    shifted    a 0    b a'   c b'        half of each is from the position before

Token shift is RWKV's (Peng et al. 2023, arXiv 2305.13048). Attention and feed-forward layers read vectors that are
shifted, then normed; the residual is not shifted. So a cache also has the halves of the newest position.

Further differences: GELU with biases, heads of any width, and, in older checkpoints, one head of keys and values for
all queries (Shazeer 2019, arXiv 1911.02150).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.nn.attention import Cache, CausalPattern, pairs
from bytelm.nn.norm import RMSNorm
from bytelm.nn.rope import rotate
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.layout import at_end

EPS = 1e-16  # added to the mean square; theirs bounds its root by 1e-8: equal except for zero vectors


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(StackConfig):
    """Shape of a stack with token shift; `ffn_dim` must be given."""

    inner: int
    """Total width of all heads."""
    rotary: bool
    """Whether queries and keys have rotary positions."""
    multi_query: bool
    """Whether one head of keys and values serves all queries."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.inner // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys, and of values."""
        return 1 if self.multi_query else self.heads

    def flops(self, new: int) -> int:
        """See `StackConfig`."""
        return self.layers * (self.products(new) + 4 * self.inner * pairs(new, self.attention_window))

    def products(self, new: int) -> int:
        """See `StackConfig`."""
        return 4 * new * self.dim * (self.inner + self.key_heads * self.head_dim + self.hidden())

    def kept(self, recompute: bool) -> int:
        """See `StackConfig`; also the shifted vectors, twice (float32), and GELU's input and output."""
        layer = 28 * self.dim + 2 * (4 * self.inner + 4 * self.key_heads * self.head_dim) + 4 * self.hidden()
        return 4 * self.dim * self.layers + layer if recompute else layer * self.layers


@dataclass(frozen=True)
class ShiftCache(Cache):
    """Keys and values, and the halves of the newest position that the next one reads `[batch, dim // 2]`."""

    attention: Tensor
    feed_forward: Tensor


def shift(
    x: Float[Tensor, "rows new dim"], view: CausalPattern, before: Float[Tensor, "rows half"]
) -> tuple[Float[Tensor, "rows new dim"], Float[Tensor, "rows half"]]:
    """Take half of each vector from the position before, 0 at document starts; also returns the newest half."""
    own, other = x.chunk(2, -1)
    ago = torch.cat([before[:, None].to(x.dtype), other[:, :-1]], 1)
    ago = ago.masked_fill(view.opens[..., None], 0.0)
    return torch.cat([own, ago], -1), at_end(other, view.lengths, before.to(x.dtype))


class ShiftAttention(nn.Module):
    """Multi-head or multi-query self-attention."""

    def __init__(self, config: ShiftConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.dim, config.inner, bias=False)
        self.key_value = nn.Linear(config.dim, 2 * config.key_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.inner, config.dim, bias=False)

    def forward(
        self, x: Float[Tensor, "rows new dim"], view: CausalPattern, cache: Cache | None
    ) -> tuple[Float[Tensor, "rows new dim"], Cache | None]:
        """The attention's output, and the cache to continue from (None if none was given)."""
        query = self.query(x).unflatten(-1, (self.config.heads, -1))
        keys, values = self.key_value(x).unflatten(-1, (2, self.config.key_heads, -1)).unbind(2)
        if self.config.rotary:
            query, keys = rotate(query, view.rotation), rotate(keys, view.rotation)
        mixed, cache = view.attend(query, keys, values, cache)
        return self.out(mixed.flatten(2)), cache


class ShiftBlock(nn.Module):
    """h = x + attention(norm shift x); h + feed_forward(norm shift h)."""

    def __init__(self, config: ShiftConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, EPS)
        self.attention = ShiftAttention(config)
        self.feed_forward_norm = RMSNorm(config.dim, EPS)
        self.up = nn.Linear(config.dim, config.hidden())
        self.down = nn.Linear(config.hidden(), config.dim)
        self.dropout = 0.0
        """See `nn.transformer.Block`."""

    def forward(
        self, x: Float[Tensor, "rows new dim"], view: CausalPattern, cache: ShiftCache | None
    ) -> tuple[Float[Tensor, "rows new dim"], ShiftCache | None]:
        """One layer over the new positions."""
        nothing = x.new_zeros(len(x), x.shape[-1] // 2)
        shifted, attention = shift(x, view, cache.attention if cache else nothing)
        mixed, kept = self.attention(self.attention_norm(shifted), view, cache)
        x = x + self.dropped(mixed)
        shifted, feed_forward = shift(x, view, cache.feed_forward if cache else nothing)
        x = x + self.dropped(self.down(F.gelu(self.up(self.feed_forward_norm(shifted)))))
        return x, None if kept is None else ShiftCache(kept.keys, kept.values, attention, feed_forward)

    def dropped(self, x: Tensor) -> Tensor:
        """The output of a sublayer, with dropout in training."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class ShiftStack(Stack):
    """Blocks with token shift. Inside patches, each patch is a document."""

    def __init__(self, config: ShiftConfig) -> None:
        self.shape = config
        super().__init__(config)

    def block(self, index: int) -> nn.Module:
        """See `Stack`."""
        return ShiftBlock(self.shape)

    def initial_state(self, batch: int, device: torch.device) -> tuple[ShiftCache, ...]:
        """The empty caches of rows."""
        empty = Cache.empty(batch, self.shape.key_heads, self.shape.head_dim, device)
        half = torch.zeros(batch, self.shape.dim // 2, device=device)
        return (ShiftCache(empty.keys, empty.values, half, half),) * self.shape.layers
