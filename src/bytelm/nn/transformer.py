"""A stack of pre-norm Transformer blocks (RMSNorm, rotary attention, SwiGLU), as in Llama and every part of BLT."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bytelm.nn import fused, runs
from bytelm.nn.attention import BLOCK, Attention, AttentionPattern, Cache, CausalPattern, Memory, RowPositions, pairs
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.state import put_rows, take_rows
from bytelm.transfer import HOST, to_device

LINE = 256  # positions: where attention goes by runs, packed lines are filled up to a multiple, so that shapes repeat


@dataclass(frozen=True)
class StackConfig:
    """Shape of a stack. `attention_window` in positions, the own one included; None sees everything before."""

    layers: int
    dim: int
    heads: int
    attention_window: int | None
    theta: float
    ffn_multiple: int = 1
    ffn_dim: int | None = field(default=None, kw_only=True)
    """Width of the feed-forward layer; None: 8/3 of `dim`, rounded up to a multiple of `ffn_multiple`."""

    def problems(self, name: str) -> list[str]:
        """What is impossible about this shape, in words."""
        found: list[str] = []
        if min(self.dim, self.heads) < 1 or self.dim % self.heads or (self.dim // self.heads) % 2:
            found.append(
                f"{name}: {self.heads} heads do not divide width {self.dim} into heads of even width; "
                f"take heads from {[h for h in range(1, min(self.dim // 2, 1024) + 1) if self.dim % (2 * h) == 0][:12]}"
            )
        if self.attention_window is not None and self.attention_window < 1:
            found.append(f"{name}: window {self.attention_window} must be at least 1")
        if self.layers < 0 or self.ffn_multiple < 1:
            found.append(f"{name}: {self.layers} layers, ffn_multiple {self.ffn_multiple}: at least 0 and 1")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            found.append(f"{name}: feed-forward width {self.ffn_dim} must be at least 1")
        if not 0 < self.theta < math.inf:
            found.append(f"{name}: theta {self.theta} must be above 0 and finite")
        return found

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.heads

    def hidden(self) -> int:
        """Width of the feed-forward layer: the one given, else as in Llama (two thirds of four times `dim`)."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        exact = int(8 * self.dim / 3)
        return -(-exact // self.ffn_multiple) * self.ffn_multiple

    def flops(self, new: int) -> int:
        """Operations of the matrix products of a whole pass over `new` positions."""
        return self.layers * (self.products(new) + 4 * self.dim * pairs(new, self.attention_window))

    def products(self, new: int) -> int:
        """Those of one layer's linear parts: all but the attention itself."""
        return 2 * new * (4 * self.dim**2 + 3 * self.dim * self.hidden())

    def kept(self, recompute: bool) -> int:
        """Bytes that a position keeps until its gradient is taken, where products are in bfloat16 and kernels fused.

        Of each layer both norms' inputs (float32), their outputs, queries, keys and values with and without rotation,
        the attention's output, gate and up, and what is made of them; or, to be recomputed, the layer's input alone.
        """
        layer = 24 * self.dim + 6 * self.hidden()
        return 4 * self.dim * self.layers + layer if recompute else layer * self.layers

    def plain(self, new: int) -> int:
        """Bytes more of one layer where torch's kernels compute instead, for a position that attends among `new`.

        The gate once more, and the mask in bfloat16; in blocks also the keys and values that each copies.
        """
        seen = pairs(new, self.attention_window) // max(1, new)
        copies = 4 * self.dim * (seen // BLOCK - 2) if self.attention_window is not None and new > BLOCK else 0
        return 2 * self.hidden() + 2 * seen + copies


def swiglu(gate_up: Float[Tensor, "... twice"]) -> Float[Tensor, "... hidden"]:
    """silu(gate) · up of the two halves of the last axis."""
    if fused.fits(gate_up) and gate_up.shape[-1] % (2 * fused.VECTOR) == 0:
        return fused.swiglu(gate_up)
    if device := fused.kernels(gate_up):
        return device.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden, halves=True)
        self.down = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """One token-wise layer."""
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    """h = x + attention(norm x); h + feed_forward(norm h)."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.heads)
        self.feed_forward_norm = RMSNorm(config.dim)
        self.feed_forward = FeedForward(config.dim, config.hidden())
        self.dropout = 0.0
        """Dropout probability of a sublayer's output (Srivastava et al. 2014)."""

    def forward(
        self, x: Float[Tensor, "rows new dim"], view: AttentionPattern[Memory], cache: Memory | None
    ) -> tuple[Float[Tensor, "rows new dim"], Memory | None]:
        """One layer over the new positions."""
        mixed, cache = self.attention(self.attention_norm(x), view, cache)
        x = x + dropped(mixed, self)
        return x + dropped(self.feed_forward(self.feed_forward_norm(x)), self), cache


@runtime_checkable
class Drops(Protocol):
    """A block, for its dropout."""

    training: bool
    dropout: float


def dropped(x: Tensor, block: Drops) -> Tensor:
    """The output of a sublayer, with dropout in training."""
    return F.dropout(x, block.dropout) if block.training and block.dropout else x


class Stack(nn.Module):
    """Blocks over positions that are bytes or patches. Owners that mix in other layers walk `blocks` themselves."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(self.block(index) for index in range(config.layers))
        self.recompute = False
        """Activation checkpointing: keep only each block's input for the backward pass, and compute the rest again."""

    def block(self, index: int) -> nn.Module:
        """A new block, called as a `Block` is."""
        return Block(self.config)

    def initial_state(self, batch: int, device: torch.device) -> tuple[Any, ...]:
        """The caches of rows that have read nothing, or what its blocks keep in their place."""
        empty = Cache.empty(batch, self.config.heads, self.config.head_dim, device)
        return (empty,) * self.config.layers

    def view(
        self,
        lengths: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        where: RowPositions,
        caches: tuple[Any, ...] | None,
    ) -> CausalPattern:
        """What each of the new positions sees; the first `lengths` of each row are real."""
        config = self.config
        cached = caches[0].keys.shape[1] if caches else 0
        shape = (config.attention_window, config.head_dim, config.theta)
        return CausalPattern.of(lengths, starts, where, cached, *shape, self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next((p.device for p in self.parameters()), HOST)

    @property
    def draws(self) -> bool:
        """Whether the blocks draw random numbers, which are to be the same where they are computed again."""
        return any(block.dropout for block in self.blocks)

    def layer(
        self, index: int, x: Tensor, view: AttentionPattern[Memory], caches: tuple[Memory, ...] | None
    ) -> tuple[Tensor, Memory | None]:
        """One block over the new positions, and its cache to continue from."""
        block = self.blocks[index]
        if caches is None and self.recompute and torch.is_grad_enabled():
            draws = self.draws
            return checkpoint(lambda h: block(h, view, None)[0], x, use_reentrant=False, preserve_rng_state=draws), None
        return block(x, view, caches[index] if caches else None)

    def forward(
        self, x: Float[Tensor, "rows new dim"], view: AttentionPattern[Memory], caches: tuple[Memory, ...] | None
    ) -> tuple[Float[Tensor, "rows new dim"], tuple[Memory, ...] | None]:
        """All blocks in order."""
        kept: list[Memory] = []
        for index in range(len(self.blocks)):
            x, cache = self.layer(index, x, view, caches)
            if cache is not None:
                kept.append(cache)
        return x, tuple(kept) if caches is not None else None

    def advance(
        self,
        x: Float[Tensor, "batch new dim"],
        counts: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        where: RowPositions,
        caches: tuple[Any, ...] | None,
    ) -> tuple[Float[Tensor, "batch new dim"], RowPositions, tuple[Any, ...] | None]:
        """All blocks over the first `counts` positions of each row, in the rows that have any and in no others.

        Returns the outputs (zeros in rows without), where the rows stand, and the caches. At least one row has some.
        Without caches nobody goes on from there, and where the rows stand need not be known.
        """
        if caches is None and runs.attends(x, self.config.head_dim):
            return self.packed(x, counts, starts, LINE), where, None
        if caches is None and len(counts) > 1 and fused.attends(x, self.config.head_dim):
            return self.packed(x, counts, starts, 1), where, None
        rows = counts.nonzero()[:, 0]
        if len(rows) == len(counts):
            view = self.view(counts, starts, where, caches)
            x, caches = self(x, view, caches)
            return x, view.after, caches
        some = take_rows(caches, rows)
        view = self.view(counts[rows], starts[rows], take_rows(where, rows), some)
        among = to_device(rows, x)
        mixed, some = self(x.index_select(0, among), view, some)
        spread = mixed.new_zeros(len(counts), *mixed.shape[1:]).index_copy(0, among, mixed)
        after = put_rows(where, rows, view.after)
        return spread, after, None if caches is None else put_rows(caches, rows, some)

    def packed(
        self,
        x: Float[Tensor, "batch new dim"],
        counts: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        multiple: int,
    ) -> Float[Tensor, "batch new dim"]:
        """All blocks over the first `counts` positions of rows that nothing came before, in one line without padding.

        Each row starts as a document does, so that attention over runs of slots never looks past it. The line is filled
        up to a `multiple` of positions with copies of the first, which stand behind all others and are not read.
        """
        slots = torch.arange(x.shape[1])
        index = (slots < counts[:, None]).flatten().nonzero()[:, 0]
        length = len(index)
        spare = -length % multiple
        opens = F.pad((starts | (slots == 0)).flatten()[index], (0, spare))[None]
        view = self.view(torch.tensor([length + spare]), opens, RowPositions.zero(1), None)
        among = to_device(F.pad(index, (0, spare)), x)
        lines = x.flatten(0, 1)
        mixed, _ = self(lines.index_select(0, among)[None], view, None)
        return mixed.new_zeros(lines.shape).index_copy(0, among[:length], mixed[0, :length]).view(x.shape)
