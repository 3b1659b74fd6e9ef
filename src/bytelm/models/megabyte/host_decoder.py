"""The parts of MEGABYTE's decoder as arrays on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from bytelm.interfaces.decoder import Ints, Wanted
from bytelm.models.megabyte.embedding import CausalConvolution, PatchEmbedding
from bytelm.models.megabyte.inner import Inner
from bytelm.models.megabyte.line import Line


class Embedding:
    """`PatchEmbedding`: patches from their ids, read again by position."""

    def __init__(self, kernels: Any, embed: PatchEmbedding) -> None:
        self.kernels, self.embed = kernels, embed
        self.byte, self.position = kernels.table(embed.byte.weight), kernels.table(embed.position.weight)
        self.pad = kernels.vector(embed.pad.weight)
        filters = [layer for layer in embed.convolutions if isinstance(layer, CausalConvolution)]
        self.filters = [(layer.size, kernels.matrix(layer.filter.weight)) for layer in filters]
        self.widen = kernels.matrix(embed.widen.weight) if isinstance(embed.widen, nn.Linear) else None
        self.weight_bytes = (self.widen.bytes if self.widen else 0) + sum(w.bytes for _, w in self.filters)
        self.reach = sum(size - 1 for size, _ in self.filters)

    def patches(self, ids: Ints, row: Ints, last: Ints) -> Any:
        """The patches `[n, dim]` that end at positions `last`."""
        size, width = self.embed.size, self.embed.size + self.reach
        offset = last[:, None] - width + 1 + np.arange(width)
        real = np.maximum(offset, 0)
        x = self.kernels.embed(self.byte, ids[row[:, None], real].ravel())
        index = self.embed.index(torch.from_numpy(real)).numpy().ravel()
        x = self.kernels.embed(self.position, index, x).reshape(*offset.shape, -1)
        for taps, weight in self.filters:
            # Outputs too far left to have all their taps are wrong, and no place of the patch reaches them.
            ago = np.arange(width)[:, None] - np.arange(taps - 1, -1, -1)
            seen = (offset[:, :, None] - np.arange(taps - 1, -1, -1) >= 0) & (ago >= 0)
            line = np.where(seen[..., None], x[:, np.maximum(ago, 0)], 0).reshape(x.shape[0] * width, -1)
            x = x + np.maximum(self.kernels.linear(weight, line).reshape(x.shape), 0)
        x = x[:, width - size :]
        first = offset[:, width - size :] < 0
        if first.any():
            pad = np.concatenate([self.pad, self.pad[:1]])  # the last place of a patch is never a pad
            x = np.where(first[..., None], pad, x)
        x = np.ascontiguousarray(x.reshape(len(x), -1))
        return x if self.widen is None else self.kernels.linear(self.widen, x)


class Stage:
    """An inner stage, or a `Line` across patches: its stack, and the conditioning of its newest patches, by place."""

    def __init__(self, kernels: Any, inner: Inner | Line, rows: int) -> None:
        self.kernels, self.inner, self.size, self.part = kernels, inner, inner.size, inner.part
        self.window = inner.stack.config.attention_window
        seen = self.window or inner.size + inner.reach
        self.layers = kernels.layers(inner.stack, rows, seen + kernels.chunk)
        self.narrow = kernels.matrix(inner.narrow.weight) if isinstance(inner.narrow, nn.Linear) else None
        self.condition = kernels.matrix(inner.condition.weight)
        self.norm = kernels.vector(inner.norm.weight)
        self.patches = kernels.chunk + 2
        self.given = kernels.zeros(rows, self.patches, inner.size, inner.stack.config.dim)

    def open(self, row: Ints, patch: Ints, above: Any) -> None:
        """Store the outputs `[n, above]` of the stage above for patches of this one."""
        parts = self.kernels.linear(self.narrow, above) if self.narrow else above
        parts = parts.reshape(len(row) * self.size, self.part)
        given = self.kernels.linear(self.condition, parts)
        self.given[row, patch % self.patches] = given.reshape(len(row), self.size, -1)

    def stale(self, row: Ints, patch: Ints) -> None:
        """Reuse for patches the outputs for the patch before."""
        self.given[row, patch % self.patches] = self.given[row, (patch - 1) % self.patches]

    def read(self, x: Any, row: Ints, position: Ints, wanted: Wanted | None = None) -> Any:
        """The stack over positions `x` [n, dim], in place; the outputs of those that are wanted."""
        patch, place = position // self.size, position % self.size
        x += self.given_at(row, patch, place)
        start = np.zeros_like(position) if self.window else patch * self.size
        return self.layers.run(x, row, position, np.where(start > 0, start - self.inner.reach, 0), wanted=wanted)

    def given_at(self, row: Ints, patch: Ints, place: Ints) -> Any:
        """The conditioning `[n, dim]` of places in patches."""
        return self.given[row, patch % self.patches, place]

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.layers.row_bytes + self.given[0].nbytes

    def cached(self) -> float:
        """Bytes of caches read per step, in the middle of a patch."""
        seen = self.window or self.size / 2 + self.inner.reach
        return seen * self.layers.slot_bytes

    def opening_bytes(self) -> int:
        """Bytes of weights read per patch, at its start."""
        return self.condition.bytes + (self.narrow.bytes if self.narrow else 0)
