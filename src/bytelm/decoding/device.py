"""Decoders on a device: the parts of decoders as tensors, with whole numbers planned on the host.

host    ids, rows, positions, patches → plan [numbers, positions]     one copy a part, from pinned memory
                                 │
device  activations ─► part ─────▼────► activations ─► next part      a CUDA graph for each shape of a plan
                        rings, which stay where they are
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.decoding import blt, megabyte
from bytelm.decoding.base import Ints, New
from bytelm.decoding.graphs import Graphs, bucket, filled
from bytelm.decoding.rings import TOGETHER, Cross, Layers
from bytelm.decoding.tensors import Tensors
from bytelm.models.blt import BLT
from bytelm.models.megabyte import Inner
from bytelm.nn.concatenate import PatchEmbedding
from bytelm.nn.cross import CrossAttention
from bytelm.nn.embed import NgramEmbedding
from bytelm.units import PAD, VOCAB

LEAST = 16  # bytes that a patch is filled up to


class Pool:
    """Patches from bytes, see `blt.Pool`."""

    def __init__(self, device: Tensors, model: BLT, kept: list[Tensor], slots: int) -> None:
        self.device, self.kept, self.slots = device, kept, slots
        self.heads, self.queries = model.config.cross_heads, model.config.queries
        self.split = device.matrix(model.encoder.split.weight)
        modules = [layer for layer in model.encoder.cross if isinstance(layer, CrossAttention)]
        self.cross = [Cross.of(device, module) for module in modules]
        self.bytes = self.split.bytes + sum(cross.bytes for cross in self.cross)
        self.graphs = Graphs(device.recorder)

    def patches(self, row: Ints, first: Ints, last: Ints) -> Tensor:
        """Patches `[n, queries · dim]` of the bytes at positions first..last."""
        longest = bucket(int((last - first).max()) + 1, LEAST)
        step = max(1, TOGETHER // longest)
        found: list[Tensor] = []
        for at in range(0, len(row), step):
            index = filled(np.arange(at, min(at + step, len(row))))
            plan = np.stack([row[index], first[index], last[index]])
            found.append(self.graphs(self._pool, plan, shape=(longest,))[: min(step, len(row) - at)])
        return torch.cat(found) if len(found) > 1 else found[0]

    def _pool(self, plan: Tensor, longest: int) -> Tensor:
        """Patches of up to `longest` bytes."""
        row, first, last = plan[:, :, None]
        at = first + torch.arange(longest, device=plan.device)
        slots, beyond = (row * self.slots + at.remainder(self.slots)).flatten(), at > last
        bias = torch.zeros(beyond.shape, dtype=self.device.stored, device=plan.device)
        bias = bias.masked_fill(beyond, float("-inf"))[:, None, None]
        heads = (self.heads, -1)
        queries: Tensor | None = None
        for cross, states in zip(self.cross, self.kept, strict=True):
            bytes = states.index_select(0, slots).unflatten(0, at.shape)
            if queries is None:
                pooled = bytes.masked_fill(beyond[..., None], float("-inf")).amax(1)
                queries = self.device.linear(self.split, pooled).unflatten(-1, (self.queries, -1))
            query = cross.query(self.device.ready(queries, cross.query_norm)).unflatten(-1, heads)
            pair = cross.key_value(self.device.ready(bytes, cross.key_norm)).unflatten(-1, (2, *heads))
            keys, values = pair.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=bias)
            queries = torch.add(cross.out(mixed.transpose(1, 2).flatten(2)), queries, alpha=2)
        assert queries is not None
        return queries.flatten(1)


class Hashed:
    """Hashed n-grams, see `blt.Hashed`: ids of table rows are computed on the host."""

    def __init__(self, device: Tensors, embed: NgramEmbedding, ids: Ints) -> None:
        assert embed.ngram is not None
        self.device, self.ids, self.rows, self.reach = device, ids, embed.rows, embed.reach
        self.table = device.table(embed.ngram.weight)
        # prime^k of the id k places after the oldest one, for each table; 0 for ids that it does not reach.
        powers = blt.hash_powers(embed)
        tables = [np.pad(line[:size], (embed.reach + 1 - size, 0)) for line in powers for size in embed.sizes]
        self.powers = np.stack(tables)

    def added(self, x: Tensor, new: New) -> Tensor:
        """Bytes `[n, dim]` and the n-grams that end there."""
        at = new.position[:, None] + np.arange(-self.reach, 1)
        ids = np.where(at < 0, PAD, self.ids[new.row[:, None], np.maximum(at, 0)])
        published = (ids + blt.PUBLISHED_OFFSET) % VOCAB
        found = (published[:, None] * self.powers).sum(-1) % self.rows + np.arange(len(self.powers)) * self.rows
        return x + F.embedding(self.device.recorder.sent(found), self.table).sum(1, dtype=x.dtype)


class Embedding(megabyte.Embedding):
    """Patches from ids, see `megabyte.Embedding`."""

    def __init__(self, device: Tensors, embed: PatchEmbedding) -> None:
        super().__init__(device, embed)
        self.device, self.graphs = device, Graphs(device.recorder)

    def patches(self, ids: Ints, row: Ints, last: Ints) -> Tensor:
        """The patches `[n, dim]` that end at positions `last` of rows."""
        index = filled(np.arange(len(row)))
        offset = last[index, None] - (self.embed.size + self.reach) + 1 + np.arange(self.embed.size + self.reach)
        real = np.maximum(offset, 0)
        places = self.embed.index(torch.from_numpy(real)).numpy()
        return self.graphs(self._patches, np.stack([ids[row[index, None], real], places, offset]))[: len(row)]

    def _patches(self, plan: Tensor) -> Tensor:
        ids, places, offset = plan
        dtype, size, width = self.device.dtype, self.embed.size, ids.shape[1]
        x = F.embedding(ids, self.byte).to(dtype) + F.embedding(places, self.position).to(dtype)
        for taps, weight in self.filters:
            back = torch.arange(taps - 1, -1, -1, device=x.device)
            at = torch.arange(width, device=x.device)[:, None] - back
            seen = (offset[..., None] >= back) & (at >= 0)
            line = torch.where(seen[..., None], x[:, at.clamp(min=0)], 0.0)
            x = x + F.relu(weight(line.flatten(2)))
        first = offset[:, width - size :] < 0
        pad = torch.cat([self.pad, self.pad[:1]])  # the last place of a patch is never one
        x = torch.where(first[..., None], pad, x[:, width - size :]).flatten(1)
        return x if self.widen is None else self.widen(x).to(dtype)


class Stage(megabyte.Stage):
    """A stack inside patches, see `megabyte.Stage`."""

    def open(self, row: Ints, patch: Ints, above: Tensor) -> None:
        """See `megabyte.Stage`."""
        parts = self.kernels.linear(self.narrow, above) if self.narrow else above
        given = self.kernels.linear(self.condition, parts.unflatten(1, (self.size, self.part)))
        self.given.flatten(0, 1).index_copy_(0, self.sent(row, patch), given)

    def stale(self, row: Ints, patch: Ints) -> None:
        """See `megabyte.Stage`."""
        given = self.given.flatten(0, 1)
        given.index_copy_(0, self.sent(row, patch), given.index_select(0, self.sent(row, patch - 1)))

    def given_at(self, row: Ints, patch: Ints, place: Ints) -> Tensor:
        """See `megabyte.Stage`."""
        at = (row * self.patches + patch % self.patches) * self.size + place
        return self.given.flatten(0, 2).index_select(0, self.kernels.recorder.sent(at))

    def sent(self, row: Ints, patch: Ints) -> Tensor:
        """Where patches of rows lie, on the device."""
        return self.kernels.recorder.sent(row * self.patches + patch % self.patches)


class Device(Tensors):
    """See `base.Backend`."""

    def layers(self, *args: Any, **options: Any) -> Layers:
        """See `Backend`."""
        return Layers(self, *args, **options)

    def pooling(self, model: BLT, kept: list[Tensor], slots: int) -> Pool:
        """See `Backend`."""
        return Pool(self, model, kept, slots)

    def hashed(self, embed: NgramEmbedding, ids: Ints) -> Hashed:
        """See `Backend`."""
        return Hashed(self, embed, ids)

    def patches(self, embed: PatchEmbedding) -> Embedding:
        """See `Backend`."""
        return Embedding(self, embed)

    def stage(self, inner: Inner, rows: int) -> Stage:
        """See `Backend`."""
        return Stage(self, inner, rows)
