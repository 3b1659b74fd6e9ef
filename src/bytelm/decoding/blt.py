"""The Byte Latent Transformer in rows: what closes a patch, thinks; every byte reads what was thought last."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from bytelm.decoding.base import Backend, Decoder, Ints, New, Reals, fetched
from bytelm.decoding.patches import Patches
from bytelm.models.blt import BLT
from bytelm.native import kernels as native
from bytelm.native.kernels import Kernels, address, array_of, tokens
from bytelm.nn.cross import CrossAttention
from bytelm.nn.embed import PRIMES, PUBLISHED_OFFSET, NgramEmbedding, wrap
from bytelm.nn.norm import EPS
from bytelm.units import PAD, VOCAB


class BLTDecoder(Decoder):
    """`models.blt` in rows."""

    drafts = True

    def __init__(self, model: BLT, kernels: Backend, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity, kernels)
        config, self.kernels = model.config, kernels
        self.window = config.window
        # A boundary is decided in float32 whatever the weights are, or it would not be the one that was trained with.
        self.patches = Patches(model.patcher, kernels.precise(), self.ids)  # pyright: ignore[reportArgumentType]
        held = min(capacity, (self.patches.longest or capacity) + self.chunk)
        local = min(capacity, config.window + self.chunk)
        encoder, decoder = model.encoder, model.decoder
        self.byte = kernels.table(encoder.embed.byte.weight)
        self.ngrams = kernels.hashed(encoder.embed, self.ids) if encoder.embed.ngram else None
        self.encoder = kernels.layers(encoder.stack, rows, local, kept=encoder.crossed, kept_slots=held)
        self.pool = kernels.pooling(model, self.encoder.kept, held)
        self.widen = kernels.matrix(model.widen.weight) if isinstance(model.widen, nn.Linear) else None
        self.latents = kernels.layers(model.latent, rows, capacity)
        self.split = kernels.matrix(decoder.split.weight)
        cross = [layer for layer in decoder.cross if isinstance(layer, CrossAttention)]
        self.decoder = kernels.layers(
            decoder.stack, rows, local, cross=cross, parts=config.queries, patches=self.chunk + 2
        )
        self.norm, self.head = kernels.vector(decoder.norm.weight), kernels.matrix(decoder.head.weight)

    def after(self, new: New) -> Any:
        """See `Decoder`."""
        # On a device the encoder is under way while a scorer is waited for.
        x = self.encoder.run(self.embedded(new), new.row, new.position, np.zeros_like(new.row))
        self.patches.decide(new)
        closed = self.patches.closed[new.row, new.position]
        before = np.maximum(new.position - 1, 0)
        whole = (closed > self.patches.closed[new.row, before]) | (new.position == 0)
        if whole.any():
            self.think(new.row[whole], closed[whole] - 1, self.begun(new, before)[whole], new.position[whole])
        return self.bytes(x, new, closed)

    def begun(self, new: New, before: Ints) -> Ints:
        """Where the patch that each new id lies in begins."""
        return np.where(new.position > 0, self.patches.first[new.row, before], 0)

    def think(self, row: Ints, patch: Ints, first: Ints, last: Ints) -> None:
        """One latent step for each patch that closes."""
        x = self.pool.patches(row, first, last)
        if self.widen:
            x = self.kernels.linear(self.widen, x)
        x = self.latents.run(x, row, patch, np.zeros_like(row))
        self.decoder.hold(self.kernels.linear(self.split, x), row, patch)

    def embedded(self, new: New) -> Any:
        """Bytes and their n-grams."""
        x = self.kernels.embed(self.byte, new.ids)
        return self.ngrams.added(x, new) if self.ngrams else x

    def bytes(self, x: Any, new: New, closed: Ints) -> Any:
        """The local decoder, each byte reading the newest patch that is whole."""
        x = self.decoder.run(x, new.row, new.position, np.zeros_like(new.row), closed - 1)
        return self.kernels.linear(self.head, x, self.norm, EPS)

    def draft(self, rows: Ints, ids: Ints) -> Reals:
        """See `Decoder`: the local models go on from the newest latent (Fast BLT's BLT-S), one id a row."""
        new = self.placed(rows, ids)
        self.patches.stay(new)
        x = self.embedded(new)
        x = self.encoder.run(x, new.row, new.position, np.zeros_like(new.row))
        return fetched(self.bytes(x, new, self.patches.closed[new.row, new.position]))

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.patches.row_bytes + sum(part.row_bytes for part in (self.encoder, self.latents, self.decoder))

    def traffic(self, length: int) -> float:
        """See `Decoder`. A patch is as long as the rows' patches were so far."""
        read = int(self.lengths.sum())
        opened = sum(int(self.patches.closed[row, n - 1]) for row, n in enumerate(self.lengths) if n)
        size = read / opened if opened else float(self.patches.longest or 4)
        seen = min(length, self.window)
        cached = seen * (self.encoder.slot_bytes + self.decoder.slot_bytes)
        cached += length / size / size * self.latents.slot_bytes
        scorer = self.patches.scorer.traffic(length) if self.patches.scorer else 0.0
        bytewise = self.encoder.weight_bytes + self.decoder.weight_bytes + self.head.bytes
        widen = self.widen.bytes if self.widen else 0
        patchwise = self.latents.weight_bytes + self.split.bytes + self.decoder.cross_bytes + self.pool.bytes + widen
        return scorer + bytewise + patchwise / size + self.rows * cached


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
        """A linear layer's weight, kept and counted."""
        found = self.kernels.matrix(weight)
        self.bytes += found.bytes
        self.weights.append(found)
        return found

    def patches(self, row: Ints, first: Ints, last: Ints) -> Reals:
        """Patches `[n, queries · dim]` of the bytes at positions first..last."""
        return self.kernels.pool(self.pool, row, first, last)


class Hashed:
    """`NgramEmbedding`: tables that hashes of the last ids look into."""

    def __init__(self, kernels: Kernels, embed: NgramEmbedding, ids: Ints) -> None:
        assert embed.ngram is not None
        self.kernels, self.ids = kernels, ids
        self.history = native.History(address(ids), ids.shape[1], PAD)
        sizes, powers = np.array(embed.sizes, np.int64), hash_powers(embed)
        shape = (len(sizes), embed.functions, embed.reach + 1, embed.rows, PUBLISHED_OFFSET, VOCAB)
        table = kernels.table(embed.ngram.weight)
        self.tables = native.Ngrams(table, address(sizes), address(powers), *shape)
        self.tables.held = (table, sizes, powers)

    def added(self, x: Reals, new: New) -> Reals:
        """Bytes `[n, dim]` and the n-grams that end there, in place."""
        self.kernels.ngrams(self.tables, self.history, tokens(new.row, new.position), x)
        return x


def hash_powers(embed: NgramEmbedding) -> Ints:
    """prime^k of each hash function `[functions, k]`, in wrapping 64-bit arithmetic."""
    longest = embed.reach + 1
    return np.array([[wrap(prime**k) for k in range(longest)] for prime in PRIMES[: embed.functions]], np.int64)
