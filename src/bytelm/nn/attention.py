"""Causal self-attention, full or windowed, with one definition for full passes and for decoding from a KV cache.

Keys stand in one line, cached ones first, so that query t of a row is slot S + t whatever the row's position is:

    slots      c c c c | n n n n n n n n          S cached (aligned on the right), then the new ones
    query t          . | . . . q                  sees slots (S + t - window, S + t], from its document's start on

A windowed call over many new bytes works in blocks of queries against the slots that the window can reach, so that
its cost is bytes × window and not bytes².
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.nn import fused, runs
from bytelm.nn.products import Linear
from bytelm.nn.rope import Rotation, rotate_two, rotation
from bytelm.patching.layout import at_end, tail
from bytelm.transfer import HOST, to_device

BLOCK = 64  # queries that attend together when a windowed call is long
PRODUCTS = 1024  # slots up to which bf16 on the CPU trains faster with plain products than with the fused kernel
SHORT = 32  # the same on a GPU, whose kernel keeps float32 gradients for 128 queries of each line, however short


def pairs(new: int, window: int | None) -> int:
    """Pairs of a query and a slot, masked ones included, that are multiplied when `new` positions are read at once."""
    if window is None or new <= BLOCK:
        return new * new
    blocks = -(-new // BLOCK)
    return blocks * BLOCK * (-(-window // BLOCK) + 1) * BLOCK


@dataclass(frozen=True)
class RowPositions:
    """Per-row position, and the position at which its current document started."""

    position: Int[Tensor, " batch"]
    start: Int[Tensor, " batch"]

    @classmethod
    def zero(cls, batch: int) -> RowPositions:
        """Rows that have read nothing."""
        zero = torch.zeros(batch, dtype=torch.long)
        return cls(zero, zero)

    def read(
        self, lengths: Int[Tensor, " batch"], starts: Bool[Tensor, "batch new"]
    ) -> tuple[Int[Tensor, "batch new"], Int[Tensor, "batch new"], RowPositions]:
        """Of new positions, at the first `lengths` of which documents start where `starts` says so.

        Returns where each stands, where its document started, and where the rows stand after them.
        """
        positions = self.position[:, None] + torch.arange(starts.shape[1])
        start = torch.where(starts, positions, -1).cummax(1).values
        start = torch.maximum(start, self.start[:, None])
        return positions, start, RowPositions(self.position + lengths, at_end(start, lengths, self.start))


@dataclass(frozen=True)
class Cache:
    """Keys (rotated) and values of the newest positions, aligned on the right: `[batch, time, heads, head_dim]`."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, head_dim: int, device: torch.device) -> Cache:
        """A cache of no positions."""
        nothing = torch.zeros(batch, 0, heads, head_dim, device=device)
        return cls(nothing, nothing)


Memory = TypeVar("Memory")
"""The state of a layer: a KV `Cache`, or the sums of `nn.linear`."""


@runtime_checkable
class AttentionPattern(Protocol[Memory]):
    """What new positions see, derived once per call and shared by all layers of a stack.

    `View` is one; others are in `nn.patches` and `nn.linear`.
    """

    @property
    def rotation(self) -> Rotation:
        """By how much the queries and keys of new positions are turned."""
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, cache: Memory | None) -> tuple[Tensor, Memory | None]:
        """What each query `[rows, new, heads, head_dim]` mixes of cached and new values, and the cache after them."""
        ...


@dataclass(frozen=True)
class Mask:
    """Which slots each query sees: `seen` is `[rows or 1, 1, queries, slots]`, or None for plain causal attention."""

    seen: Tensor | None
    queries: int
    device: torch.device

    @cached_property
    def bias(self) -> Tensor:
        """The same as something to add to scores in bf16."""
        seen = self.seen
        if seen is None:
            seen = torch.ones(self.queries, self.queries, dtype=torch.bool, device=self.device).tril()
        return torch.zeros(seen.shape, dtype=torch.bfloat16, device=self.device).masked_fill(~seen, float("-inf"))


@dataclass(frozen=True)
class CausalPattern:
    """Causal attention pattern: each new position attends to the slots from `first` to its own.

    All but the rotation is on the host (`bytelm.transfer`); masks are made on the device of attention.
    """

    starts: Bool[Tensor, "batch new"]
    """Where a document starts."""
    first: Int[Tensor, "batch new"]
    """The window and the start of the document, as a slot (int32)."""
    rotation: Rotation
    lengths: Int[Tensor, " batch"]
    cached: int
    block: int
    """Queries in a block; 0 for one dense block."""
    reach: int
    """Slots before a block that its queries may see: the window, rounded up to whole blocks."""
    keep: int
    """Slots to keep for the next call."""
    after: RowPositions
    device: torch.device
    """Where attention is computed."""
    runs: runs.Runs | None
    """The same without a mask, where there is a kernel for it."""

    @classmethod
    def of(
        cls,
        lengths: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        where: RowPositions,
        cached: int,
        window: int | None,
        head_dim: int,
        theta: float,
        device: torch.device = HOST,
        turned: int | None = None,
    ) -> CausalPattern:
        """Derive the view. `starts` marks the new positions at which a document starts; `turned` see `rotation`."""
        new = starts.shape[1]
        slots = cached + torch.arange(new)
        before = where.position[:, None] - cached  # the position of slot 0
        positions, start, after = where.read(lengths, starts)
        longest = int(after.position.max()) if len(lengths) else 0
        block = BLOCK if window is not None and new > BLOCK else 0
        width = window or new + cached
        opens = (start - before).clamp(min=0)
        alike = bool((where.position == where.position[:1]).all())  # then one row of angles is that of all
        return cls(
            starts=starts,
            first=torch.maximum(slots - width + 1, opens).int(),
            rotation=rotation(to_device(positions[:1] if alike else positions, device), head_dim, theta, turned),
            lengths=lengths,
            cached=cached,
            block=block,
            reach=-(-width // block) * block if block else 0,
            keep=min(longest, cached + new, width),
            after=after,
            device=device,
            runs=runs.causal(opens, cached, window, device),
        )

    @cached_property
    def opens(self) -> Bool[Tensor, "batch new"]:
        """Where a document starts, as layers that do not mix over it need it."""
        return to_device(self.starts, self.device)

    @cached_property
    def document(self) -> Int[Tensor, "batch new"]:
        """Documents that started at or before each position, as layers with a state need it; 0 continues the last."""
        real = torch.arange(self.starts.shape[1]) < self.lengths[:, None]
        return to_device((self.starts & real).long().cumsum(1), self.device)

    @cached_property
    def mask(self) -> Mask:
        """The same as a mask: `[batch, 1, new, slots]`, or `[batch · blocks, 1, block, reach + block]` if blocked."""
        new, device = self.first.shape[1], self.device
        if not self.block:
            # From the first slot on, nothing cached: plain causal attention needs no mask.
            if self.cached == 0 and not bool(self.first.any()):
                return Mask(None, new, device)
            first = to_device(self.first, device)
            slots = torch.arange(self.cached + new, device=device)
            last = slots[self.cached :, None]
            return Mask(((slots >= first[..., None]) & (slots <= last))[:, None], new, device)
        blocks = -(-new // self.block)
        first = F.pad(to_device(self.first, device), (0, blocks * self.block - new)).unflatten(1, (blocks, self.block))
        slots = torch.arange(self.reach + self.block, device=device)
        last = self.reach + torch.arange(self.block, device=device)[:, None]
        # A block's own slot 0 is that many slots before or after slot 0 of the line.
        shift = self.cached + torch.arange(blocks, device=device) * self.block - self.reach
        seen = (slots <= last) & (slots >= first[..., None] - shift[:, None, None])
        return Mask(seen.flatten(0, 1)[:, None], self.block, device)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        """See `Sight`."""
        if self.cached and cache is not None:
            keys, values = torch.cat([cache.keys, keys], 1), torch.cat([cache.values, values], 1)
        mixed = self.over(query, keys, values)
        if cache is not None:
            ends = self.cached + self.lengths
            cache = Cache(tail(keys, ends, self.keep), tail(values, ends, self.keep))
        return mixed, cache

    def over(
        self,
        query: Float[Tensor, "batch new heads head_dim"],
        keys: Float[Tensor, "batch slots #heads head_dim"],
        values: Float[Tensor, "batch slots #heads head_dim"],
    ) -> Float[Tensor, "batch new heads head_dim"]:
        """Attention of the new queries over cached and new slots; a long windowed call goes in blocks of queries."""
        if self.runs is not None and self.runs.fits(query):
            mixed = self.runs.attend(query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
            return mixed.unflatten(0, query.shape[:2])
        if fused.fits(query):
            return fused.attention(query, keys, values, self.first)
        if not self.block:
            return mix(query, keys, values, self.mask)
        new, block = query.shape[1], self.block
        blocks = -(-new // block)
        spare = blocks * block - new

        def reached(x: Tensor) -> Tensor:
            # Front: what a block may see before the first new slot, filled up with slots that the mask hides.
            x = F.pad(x, (0, 0, 0, 0, self.reach - self.cached, spare)).unflatten(1, (-1, block))
            shifted = [x[:, i : i + blocks] for i in range(self.reach // block + 1)]
            return torch.cat(shifted, 2).flatten(0, 1)

        query = F.pad(query, (0, 0, 0, 0, 0, spare)).unflatten(1, (blocks, block)).flatten(0, 1)
        mixed = mix(query, reached(keys), reached(values), self.mask)
        return mixed.unflatten(0, (-1, blocks)).flatten(1, 2)[:, :new]


def few(device: str) -> int:
    """Slots up to which attention in bf16 is plain products.

    The fused kernel's backward pass is five times slower than these on a CPU (docs/log.md). That of a GPU is made for
    long lines, and fails where its gradients of short ones are 2^31 numbers or more.
    """
    if device == "cuda":
        return SHORT
    return PRODUCTS if device == "cpu" and torch.is_grad_enabled() else 0


def mix(query: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """Scaled dot-product attention proper, all `[batch, positions, heads, head_dim]`; keys may have one head."""
    keys, values = (x.expand(-1, -1, query.shape[2], -1) for x in (keys, values))
    q, k, v = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    if q.dtype == torch.bfloat16 and k.shape[2] <= few(q.device.type):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask.bias
        return (scores.softmax(-1) @ v).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.seen, is_causal=mask.seen is None)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "rows new dim"], view: AttentionPattern[Memory], cache: Memory | None
    ) -> tuple[Float[Tensor, "rows new dim"], Memory | None]:
        """The attention's output, and the cache to continue from (None if none was given)."""
        query, keys, values = rotate_two(self.qkv(x).unflatten(-1, (3, self.heads, -1)), view.rotation)
        mixed, cache = view.attend(query, keys, values, cache)
        return self.out(mixed.flatten(2)), cache
