"""The parts of BLT's decoder as arrays on the host."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bytelm.interfaces.decoder import Ints, NewTokens, Reals
from bytelm.models.blt.embed import PUBLISHED_OFFSET, NgramEmbedding, hash_powers
from bytelm.models.blt.model import BLT
from bytelm.native import kernels as native
from bytelm.native.kernels import Kernels, address, array_of, tokens
from bytelm.nn.cross import CrossAttention
from bytelm.nn.norm import EPS
from bytelm.nn.tables import StoredTable
from bytelm.units import PAD, VOCAB


class Pool:
    """`Encoder.patches`: a patch's queries, from the encoder's outputs at its bytes."""

    def __init__(self, kernels: Kernels, model: BLT, kept: list[Reals], slots: int) -> None:
        config, self.kernels = model.config, kernels
        self.bytes = 0
        self.arrays: list[Reals] = []
        self.weights: list[native.Matrix] = []
        layers: list[native.PoolLayer] = []
        for layer, states in zip(model.encoder.cross, kept, strict=True):
            assert isinstance(layer, CrossAttention)
            norms = [kernels.vector(norm.weight) for norm in (layer.query_norm, layer.key_norm)]
            self.arrays += norms
            linear = [self.matrix(part.weight) for part in (layer.query, layer.key_value, layer.out)]
            layers.append(native.PoolLayer(address(states), *map(address, norms), *linear))
        self.layers, self.held = array_of(native.PoolLayer, layers), layers
        shape = (len(layers), config.local_dim, config.cross_heads, config.queries, slots)
        self.split = self.matrix(model.encoder.split.weight)
        self.pool = native.Pool(*shape, EPS, self.split, self.layers)

    def matrix(self, weight: Tensor) -> native.Matrix:
        """A linear layer's weight, kept alive and counted."""
        found = self.kernels.matrix(weight)
        self.bytes += found.bytes
        self.weights.append(found)
        return found

    def patches(self, row: Ints, first: Ints, last: Ints) -> Reals:
        """Patches `[n, queries · dim]` of the bytes at positions first..last."""
        return self.kernels.pool(self.pool, row, first, last)


class Hashed:
    """`NgramEmbedding`: hashed n-grams."""

    def __init__(self, kernels: Kernels, embed: NgramEmbedding, ids: Ints) -> None:
        assert embed.ngram is not None
        self.kernels, self.ids = kernels, ids
        self.history = native.History(address(ids), ids.shape[1], PAD)
        sizes, powers = np.array(embed.sizes, np.int64), hash_powers(embed)
        shape = (len(sizes), embed.functions, embed.reach + 1, embed.rows, PUBLISHED_OFFSET, VOCAB)
        self.stored = embed.ngram if isinstance(embed.ngram, StoredTable) and embed.ngram.file else None
        table = native.Matrix() if self.stored else kernels.table(embed.ngram.weight)
        self.tables = native.Ngrams(table, address(sizes), address(powers), *shape)
        self.tables.held = (table, sizes, powers)
        self.more = embed.ngram.weight.shape[1] - embed.byte.weight.shape[1]
        self.index: Ints | None = None
        """The rows that `prefetch` asked for."""

    def prefetch(self, new: NewTokens) -> None:
        """Have the rows of new bytes ready for `added`, which comes next, if they are in a file."""
        if self.stored:
            self.index = self.kernels.hashes(self.tables, self.history, tokens(new.row, new.position))
            self.stored.prefetch(self.index)

    def added(self, x: Reals, new: NewTokens) -> tuple[Reals, Reals | None]:
        """Bytes `x` [n, dim] with the n-grams that end there, and what these are for the output, if anything."""
        narrow, dim = x, x.shape[1]
        if self.more:
            x = np.zeros((len(narrow), dim + self.more), narrow.dtype)
            x[:, :dim] = narrow
        if self.stored:
            assert self.index is not None  # `prefetch`, of the same bytes
            self.stored.add(self.kernels, self.index, x)
        else:
            self.kernels.ngrams(self.tables, self.history, tokens(new.row, new.position), x)
        return (x[:, :dim].copy(), x[:, dim:]) if self.more else (x, None)
