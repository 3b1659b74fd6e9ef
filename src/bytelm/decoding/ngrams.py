"""Hashed n-grams of new bytes, from the ids of their rows: added to embeddings in decoders."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.decoding.tensors import Tensors
from bytelm.interfaces.decoder import Ints, NewTokens, Reals
from bytelm.native import kernels as native
from bytelm.native.kernels import Kernels, address, tokens
from bytelm.nn.ngrams import PUBLISHED_OFFSET, NgramEmbedding, hash_powers
from bytelm.nn.tables import StoredTable
from bytelm.transfer import to_device
from bytelm.units import PAD


class HostNgrams:
    """`NgramEmbedding` as arrays on the host."""

    def __init__(self, kernels: Kernels, embed: NgramEmbedding, ids: Ints) -> None:
        assert embed.ngram is not None
        self.kernels, self.ids = kernels, ids
        self.history = native.History(address(ids), ids.shape[1], PAD)
        sizes, powers = np.array(embed.sizes, np.int64), hash_powers(embed)
        shape = (len(sizes), embed.functions, embed.reach + 1, embed.rows, PUBLISHED_OFFSET, embed.vocabulary)
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


class DeviceNgrams:
    """The same as tensors on a device; nothing is read ahead there."""

    def __init__(self, device: Tensors, embed: NgramEmbedding, ids: Ints) -> None:
        assert embed.ngram is not None
        self.device, self.ids, self.rows, self.reach = device, ids, embed.rows, embed.reach
        self.vocabulary, self.table = embed.vocabulary, device.table(embed.ngram.weight)
        # prime^k for the id k after the oldest, for each table; 0 for ids that it does not reach.
        powers = hash_powers(embed)
        tables = [np.pad(line[:size], (embed.reach + 1 - size, 0)) for line in powers for size in embed.sizes]
        self.powers = np.stack(tables)

    def prefetch(self, new: NewTokens) -> None:
        """Nothing."""

    def added(self, x: Tensor, new: NewTokens) -> tuple[Tensor, Tensor | None]:
        """See `HostNgrams.added`."""
        at = new.position[:, None] + np.arange(-self.reach, 1)
        ids = np.where(at < 0, PAD, self.ids[new.row[:, None], np.maximum(at, 0)])
        published = (ids + PUBLISHED_OFFSET) % self.vocabulary
        found = (published[:, None] * self.powers).sum(-1) % self.rows + np.arange(len(self.powers)) * self.rows
        index = to_device(torch.from_numpy(found), self.table)  # the tables may be on the host
        found = to_device(F.embedding(index, self.table).sum(1, dtype=x.dtype), x)
        dim = x.shape[1]
        return x + found[:, :dim], found[:, dim:] if found.shape[1] > dim else None
