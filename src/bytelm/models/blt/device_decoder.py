"""The parts of BLT's decoder as tensors on a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.decoding.graphs import Graphs, bucket, filled
from bytelm.decoding.rings import TOGETHER, Cross
from bytelm.decoding.tensors import Tensors
from bytelm.interfaces.decoder import Ints, NewTokens
from bytelm.models.blt.embed import PUBLISHED_OFFSET, NgramEmbedding, hash_powers
from bytelm.models.blt.model import BLT
from bytelm.nn.cross import CrossAttention
from bytelm.transfer import to_device
from bytelm.units import PAD, VOCAB

LEAST = 16  # bytes to which a patch is padded


class Pool:
    """Patches from bytes, see `host_decoder.Pool`."""

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
        """The patches of up to `longest` bytes."""
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
    """Hashed n-grams, see `host_decoder.Hashed`."""

    def __init__(self, device: Tensors, embed: NgramEmbedding, ids: Ints) -> None:
        assert embed.ngram is not None
        self.device, self.ids, self.rows, self.reach = device, ids, embed.rows, embed.reach
        self.table = device.table(embed.ngram.weight)
        # prime^k for the id k after the oldest, for each table; 0 for ids that it does not reach.
        powers = hash_powers(embed)
        tables = [np.pad(line[:size], (embed.reach + 1 - size, 0)) for line in powers for size in embed.sizes]
        self.powers = np.stack(tables)

    def added(self, x: Tensor, new: NewTokens) -> tuple[Tensor, Tensor | None]:
        """See `host_decoder.Hashed.added`."""
        at = new.position[:, None] + np.arange(-self.reach, 1)
        ids = np.where(at < 0, PAD, self.ids[new.row[:, None], np.maximum(at, 0)])
        published = (ids + PUBLISHED_OFFSET) % VOCAB
        found = (published[:, None] * self.powers).sum(-1) % self.rows + np.arange(len(self.powers)) * self.rows
        index = to_device(torch.from_numpy(found), self.table)  # the tables may be on the host
        found = to_device(F.embedding(index, self.table).sum(1, dtype=x.dtype), x)
        dim = x.shape[1]
        return x + found[:, :dim], found[:, dim:] if found.shape[1] > dim else None
