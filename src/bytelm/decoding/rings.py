"""A stack of blocks over rows on a device, with ring buffers: position p of a row is in slot p mod slots.

New positions are a grid `[rows, new]`; padding writes into a spare row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.decoding.graphs import Graphs, bucket, filled
from bytelm.decoding.tensors import Matrix, Tensors
from bytelm.interfaces.decoder import Ints
from bytelm.nn import fused
from bytelm.nn.cross import CrossAttention
from bytelm.nn.transformer import Block, Stack

TOGETHER = 4096  # positions computed at once, of rows with several new ones
LEAST = 64  # visible positions: fewer are not faster, and would be further shapes
ALIGNED = 8  # slots of a ring are a multiple, for the vectorised masks of attention kernels
FEW, SHORT = 128, 256  # up to rows × heads, and above visible positions: attention by batched matmuls


def grids(row: Ints) -> Iterator[Ints]:
    """New positions as grids `[rows, new]` of indices, -1 for padding; rows with one new position separately."""
    if len(row) == 1 or bool((row[1:] != row[:-1]).all()):
        found = np.full((bucket(len(row)), 1), -1)
        found[: len(row), 0] = np.arange(len(row))
        yield found
        return
    begin = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
    count = np.diff(np.append(begin, len(row)))
    for some in (count == 1, count > 1):
        first, longest = begin[some], bucket(int(count[some].max(initial=1)))
        step = max(1, TOGETHER // longest) if longest > 1 else max(1, len(first))
        place = np.arange(longest)
        for at in range(0, len(first), step):
            part = slice(at, at + step)
            found = np.full((bucket(len(first[part])), longest), -1)
            real = place < count[some][part, None]
            found[: len(real)] = np.where(real, first[part, None] + place, -1)
            yield found


def turns(position: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotations `[n, 1, 1, head_dim / 2]` of positions as complex numbers; angles in float64, as in `nn.rope`."""
    angles = position[:, None, None, None].double() * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    return turn.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the pairs of vectors `[n, 2, heads, head_dim]`."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of the two halves."""
    if device := fused.kernels(gate_up):
        return device.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def attended(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention `[rows, heads, new, head_dim]` with the additive mask `bias` [rows, heads or 1, new, spans]."""
    rows, heads, new, size = query.shape
    if new > 1 or rows * heads > FEW or keys.shape[2] <= SHORT:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
    # The fused kernel is sequential over the keys of a head: with few heads, matmuls use more of the device.
    query, keys, values, bias = (x.flatten(0, 1) for x in (query, keys, values, bias))
    scores = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=size**-0.5)
    return (scores.softmax(-1) @ values).unflatten(0, (rows, heads))


@dataclass(frozen=True)
class Cross:
    """The weights of the cross-attention before a block."""

    query_norm: Tensor
    key_norm: Tensor
    query: Matrix
    key_value: Matrix
    out: Matrix

    @classmethod
    def of(cls, device: Tensors, cross: CrossAttention) -> Cross:
        """Those of a module."""
        query_norm, key_norm = (device.vector(norm.weight) for norm in (cross.query_norm, cross.key_norm))
        query, key_value, out = (device.matrix(part.weight) for part in (cross.query, cross.key_value, cross.out))
        return cls(query_norm, key_norm, query, key_value, out)

    @property
    def bytes(self) -> int:
        """Bytes of its matrices."""
        return self.query.bytes + self.key_value.bytes + self.out.bytes


@dataclass(frozen=True)
class Weights:
    """The weights of a block."""

    attention_norm: Tensor
    qkv: Matrix
    out: Matrix
    feed_forward_norm: Tensor
    gate_up: Matrix
    down: Matrix

    @classmethod
    def of(cls, device: Tensors, block: Block) -> Weights:
        """Those of a module."""
        attention, wide = block.attention, block.feed_forward
        norms = [device.vector(norm.weight) for norm in (block.attention_norm, block.feed_forward_norm)]
        qkv, out = device.matrix(attention.qkv.weight), device.matrix(attention.out.weight)
        return cls(norms[0], qkv, out, norms[1], device.matrix(wide.gate_up.weight), device.matrix(wide.down.weight))

    @property
    def bytes(self) -> int:
        """Bytes of its matrices."""
        return self.qkv.bytes + self.out.bytes + self.gate_up.bytes + self.down.bytes


class Layers:
    """All blocks of a stack over rows, see `stacks.Layers`."""

    def __init__(
        self,
        device: Tensors,
        stack: Stack,
        rows: int,
        seen: int,
        *,
        kept: Sequence[int] = (),
        kept_slots: int = 0,
        cross: Sequence[CrossAttention] = (),
        parts: int = 0,
        patches: int = 0,
    ) -> None:
        config = stack.config
        self.device, self.config, self.rows = device, config, rows
        self.slots = -(-seen // ALIGNED) * ALIGNED
        frequencies = config.theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
        self.frequencies = device.recorder.sent(frequencies)
        self.blocks: list[Weights] = []
        for block in stack.blocks:
            assert isinstance(block, Block)
            self.blocks.append(Weights.of(device, block))
        self.cross = [Cross.of(device, module) for module in cross]
        self.cross_heads = cross[0].heads if cross else 0
        whole = rows + 1  # the spare row takes the padding
        ring = (whole, config.heads, 2, self.slots, config.head_dim)
        self.rings = [device.zeros(*ring, dtype=device.stored) for _ in self.blocks]
        self.kept_layers, self.kept_slots = list(kept), kept_slots
        self.kept = [device.zeros(whole * kept_slots, config.dim) for _ in kept]
        self.parts, self.patches = parts, patches
        held = (whole * patches, len(cross), parts, 2, config.dim) if cross else (0,)
        self.held = device.zeros(*held, dtype=device.stored)
        self.read, self.write = Graphs(device.recorder), Graphs(device.recorder)
        self.weight_bytes = sum(w.bytes for w in self.blocks) + sum(c.query.bytes + c.out.bytes for c in self.cross)
        self.cross_bytes = sum(c.key_value.bytes for c in self.cross)
        self.slot_bytes = config.layers * 2 * config.dim * device.stored.itemsize

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return sum(x.nbytes for x in (*self.rings, *self.kept, self.held)) // (self.rows + 1)

    def run(
        self,
        x: Tensor,
        row: Ints,
        position: Ints,
        start: Ints,
        patch: Ints | None = None,
        wanted: None = None,  # no `prefills`
    ) -> Tensor:
        """All blocks over new positions `x` [n, dim]. `start`: the first visible position of each."""
        first = np.maximum(start, position - (self.config.attention_window or self.slots) + 1)
        every = list(grids(row))
        if every[0].size == len(row):  # a single grid without padding
            return self.over(every[0], x, row, position, first, patch)
        found: list[Tensor] = []
        for grid in every:
            index = self.device.recorder.sent(np.maximum(grid, 0).ravel())
            found.append(self.over(grid, x.index_select(0, index), row, position, first, patch))
        places = np.concatenate([grid.ravel() for grid in every])
        back = np.empty(len(row), np.int64)
        back[places[places >= 0]] = np.flatnonzero(places >= 0)
        return torch.cat(found).index_select(0, self.device.recorder.sent(back))

    def over(self, grid: Ints, x: Tensor, row: Ints, position: Ints, first: Ints, patch: Ints | None) -> Tensor:
        """All blocks over a grid of the new positions."""
        real = grid >= 0
        index = np.maximum(np.maximum.accumulate(grid, 1), 0)  # padding repeats the last position of its row
        own = np.where(real[:, :1], row[index], self.rows)
        spare = own == self.rows
        into = np.where(real, own, self.rows)
        at, since = np.where(spare, 0, position[index]), np.where(spare, 0, first[index])
        plan = np.zeros((7, *grid.shape), np.int64)
        plan[:5] = own, at, since, into, at % self.slots
        if self.kept:
            plan[5] = into * self.kept_slots + at % self.kept_slots
        if patch is not None:
            plan[6] = own * self.patches + patch[index] % self.patches
        newest = int(at.max())
        spans, top = bucket(int((at[:, -1:] - since).max()) + 1, LEAST), min(bucket(newest + 1, LEAST), self.slots)
        # A prefix of rows and slots needs no gathering.
        plain = newest < top <= spans and bool((own[:, 0] == np.arange(len(own))).all())
        return self.read(self._read, plan, x, shape=(top if plain else spans, plain))

    def _read(self, plan: Tensor, x: Tensor, spans: int, plain: bool) -> Tensor:
        """All blocks over a grid of positions that see `spans` slots: the first ones (`plain`), or the newest."""
        rows, dtype, heads = plan.shape[1], self.device.dtype, self.config.heads
        own, position, first = plan[0, :, :1], plan[1], plan[2]
        into, slot, kept = plan[3].flatten(), plan[4].flatten(), plan[5].flatten()
        back = torch.arange(spans, device=plan.device)[None]
        seen = back if plain else position[:, -1:] - back
        slots = seen.remainder(self.slots)
        hidden = (seen[:, None] < first[..., None]) | (seen[:, None] > position[..., None])
        bias = torch.zeros(hidden.shape, dtype=self.device.stored, device=plan.device)
        bias = bias.masked_fill(hidden, float("-inf"))[:, None]
        if position.shape[1] == 1:  # once instead of per layer
            bias = bias.expand(-1, heads, -1, -1).contiguous()
        turn = turns(position.flatten(), self.frequencies, dtype)
        parts = self.held.index_select(0, plan[6].flatten()) if self.cross else None
        for index, block in enumerate(self.blocks):
            if parts is not None:
                x = self._crossed(self.cross[index], x, parts[:, index])
            qkv = block.qkv(self.device.ready(x, block.attention_norm)).unflatten(-1, (3, heads, -1))
            qkv[:, :2].copy_(turned(qkv[:, :2].to(dtype), turn))
            ring = self.rings[index]
            ring[into, :, :, slot] = qkv[:, 1:].transpose(1, 2)
            pair = ring[:rows, :, :, :spans] if plain else ring[own, :, :, slots].permute(0, 2, 3, 1, 4)
            query = qkv[:, 0].unflatten(0, plan.shape[1:]).transpose(1, 2)
            mixed = attended(query, pair[:, :, 0], pair[:, :, 1], bias)
            x = x + block.out(mixed.transpose(1, 2).reshape(x.shape))
            x = x + block.down(gated(block.gate_up(self.device.ready(x, block.feed_forward_norm))))
            if index in self.kept_layers:
                self.kept[self.kept_layers.index(index)].index_copy_(0, kept, x)
        return x

    def _crossed(self, cross: Cross, x: Tensor, parts: Tensor) -> Tensor:
        """Cross-attention of positions to the parts `[n, parts, 2, dim]` of one patch each."""
        heads = (self.cross_heads, -1)
        query = cross.query(self.device.ready(x, cross.query_norm)).unflatten(-1, heads)[:, :, None]
        keys, values = parts.unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, keys, values)
        return torch.add(cross.out(mixed.flatten(1)), x, alpha=2)  # the published models add the residual twice

    def hold(self, x: Tensor, row: Ints, patch: Ints) -> None:
        """Store patches `[n, parts · dim]` for the cross-attentions."""
        at = filled(row * self.patches + patch % self.patches)
        if len(at) > len(x):  # padding writes the last patch again
            x = x.index_select(0, self.device.recorder.sent(filled(np.arange(len(x)))))
        self.write(self._hold, at[None], x)

    def _hold(self, plan: Tensor, x: Tensor) -> Tensor:
        lines = x.unflatten(-1, (self.parts, -1))
        found = [c.key_value(self.device.ready(lines, c.key_norm)).unflatten(-1, (2, -1)) for c in self.cross]
        self.held.index_copy_(0, plan[0], torch.stack(found, 1))
        return plan
