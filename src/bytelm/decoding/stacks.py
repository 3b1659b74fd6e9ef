"""A stack of blocks for the host kernels: packed weights, and ring buffers at fixed addresses."""

from __future__ import annotations

import decimal
import functools
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.interfaces.decoder import Ints, Reals, Wanted
from bytelm.native import kernels as native
from bytelm.native.kernels import Kernels, address, array_of, tokens
from bytelm.native.packing import PANEL, SIZES
from bytelm.nn.cross import CrossAttention
from bytelm.nn.norm import EPS
from bytelm.nn.transformer import Block, Stack


@functools.cache
def frequencies(theta: float, head_dim: int) -> NDArray[np.float64]:
    """theta^(-2i / head_dim) `[head_dim / 2]`, the angles of RoPE at position 1, correctly rounded on every machine.

    numpy's powers, like torch's, differ between processors in their last digits.
    """
    with decimal.localcontext(prec=40):
        powers = [Decimal(theta) ** (Decimal(-index) / head_dim) for index in range(0, head_dim, 2)]
    found = np.array([float(power) for power in powers])
    found.flags.writeable = False  # it is shared
    return found


class Layers:
    """All blocks of a stack over rows. `seen`: positions in a row's caches, rounded up to complete vectors.

    `kept`: layers whose outputs are kept for `kept_slots` positions. `cross`: the cross-attention before each block, to
    one patch of `parts` vectors; each row keeps `patches` of them.
    """

    def __init__(
        self,
        kernels: Kernels,
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
        config, lanes = stack.config, kernels.lanes
        self.kernels = kernels
        head_dim = config.dim // config.heads
        slots = -(-seen // lanes) * lanes
        padded = -(-head_dim // lanes) * lanes
        self.frequencies = frequencies(config.theta, head_dim)
        self.angles = np.concatenate(kernels.turns(np.arange(native.STEP)[:, None] * self.frequencies), 1)
        self.arrays: list[NDArray[Any]] = []
        self.weights: list[native.Matrix] = []
        self.kept: list[Reals] = []
        self.weight_bytes = self.cross_bytes = 0
        layers: list[native.Layer] = []
        for index, block in enumerate(stack.blocks):
            assert isinstance(block, Block)
            layer = self.block(block)
            keys = self.room(rows, config.heads, slots, head_dim, kind=kernels.cached)
            values = self.room(rows, config.heads, slots, padded, kind=kernels.cached)
            layer.keys, layer.values = address(keys), address(values)
            if index in kept:
                self.kept.append(self.room(rows, kept_slots, config.dim))
                layer.kept = address(self.kept[-1])
            if cross:
                self.crossed(layer, cross[index], self.room(rows, patches, parts, 2 * config.dim))
            layers.append(layer)
        tables = address(self.frequencies), address(self.angles)
        shape = native.Heads(config.heads, head_dim, slots, config.attention_window or 0, *tables)
        hidden = -(-config.hidden() // PANEL) * PANEL
        numbers = (config.layers, config.dim, hidden, kernels.cached)
        heads = cross[0].heads if cross else 0
        # ctypes structures keep arrays alive only if they own them.
        self.layers = array_of(native.Layer, layers)
        self.held = layers
        self.stack = native.Stack(*numbers, shape, EPS, kept_slots, heads, parts, patches, self.layers)
        self.slot_bytes = config.layers * 2 * config.dim * SIZES[kernels.cached]
        """Bytes of keys and values of one position."""

    def block(self, block: Block) -> native.Layer:
        """The weights of one block."""
        layer = native.Layer()
        layer.attention_norm = self.vector(block.attention_norm.weight)
        layer.qkv = self.matrix(block.attention.qkv.weight)
        layer.out = self.matrix(block.attention.out.weight)
        layer.feed_forward_norm = self.vector(block.feed_forward_norm.weight)
        layer.gate_up = self.matrix(block.feed_forward.gate_up.weight, halves=True)
        layer.down = self.matrix(block.feed_forward.down.weight)
        return layer

    def crossed(self, layer: native.Layer, cross: CrossAttention, parts: Reals) -> None:
        """The weights of the cross-attention before a block."""
        layer.query_norm, layer.key_norm = self.vector(cross.query_norm.weight), self.vector(cross.key_norm.weight)
        layer.query, layer.cross_out = self.matrix(cross.query.weight), self.matrix(cross.out.weight)
        before = self.weight_bytes
        layer.key_value = self.matrix(cross.key_value.weight)
        self.cross_bytes += self.weight_bytes - before
        self.weight_bytes = before  # read per patch instead of per position
        layer.parts = address(parts)

    def room(self, *shape: int, kind: int | None = None) -> NDArray[Any]:
        """Allocate memory with rows as first axis, counted."""
        self.arrays.append(self.kernels.zeros(*shape, kind=kind))
        return self.arrays[-1]

    def vector(self, weight: Any) -> int | None:
        """The address of a norm's weight."""
        self.arrays.append(self.kernels.vector(weight)[None])
        return address(self.arrays[-1])

    def matrix(self, weight: Any, halves: bool = False) -> native.Matrix:
        """A linear layer's weight, kept alive and counted."""
        found = self.kernels.matrix(weight, halves=halves)
        self.weights.append(found)
        self.weight_bytes += found.bytes
        return found

    def run(
        self,
        x: Reals,
        row: Ints,
        position: Ints,
        start: Ints,
        patch: Ints | None = None,
        wanted: Wanted | None = None,
    ) -> Reals:
        """All blocks over new positions `x` [n, dim], in place. `start`: the first visible position of each.

        `wanted` [n]: whose outputs are returned, all by default; the last block is computed for these alone.
        """
        self.kernels.run(self.stack, tokens(row, position, start, patch, wanted), x)
        return x if wanted is None else x[: np.count_nonzero(wanted)]

    def hold(self, x: Reals, row: Ints, patch: Ints) -> None:
        """Store patches `[n, parts · dim]` for the cross-attentions."""
        self.kernels.parts(self.stack, x, row, patch)

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return sum(array[0].nbytes for array in self.arrays if array.ndim > 2)
