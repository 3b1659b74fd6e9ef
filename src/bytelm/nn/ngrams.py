"""Byte embedding plus hashed n-gram embeddings (BLT paper, section 3.2.1, eqs. 2-5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from bytelm.nn import fused
from bytelm.nn.rows import RowGradients, bags, sent, sum_rows
from bytelm.nn.sharded import ShardedRows, empty_rows
from bytelm.nn.tables import StoredTable
from bytelm.patching.layout import Rows, tail
from bytelm.units import PAD, VOCAB

# One prime per hash function, as published with the model.
PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
PUBLISHED_OFFSET = 4  # the published hash is over ids whose specials come first: theirs = (ours + 4) mod 260


def table_problems(sizes: tuple[int, ...], rows: int, output: bool = False) -> list[str]:
    """What is impossible about the options of a model's n-gram tables, in words."""
    found: list[str] = []
    if any(size < 2 for size in sizes) or rows < 1:
        found.append("model.ngram_sizes must be at least 2 and model.ngram_rows at least 1")
    if output and not sizes:
        found.append("model.ngram_output = true needs tables: set model.ngram_sizes")
    return found


class NgramEmbedding(nn.Module):
    """e_t = byte(x_t) + sum over functions and sizes n of table[hash(x_{t-n+1} .. x_t)], for ids x of a vocabulary.

    hash = (sum over k of id_k · prime^k) mod rows, oldest id first, in wrapping 64-bit arithmetic. n-grams do not
    cross the start of a document: ids before it count as PAD. Rows of `parts` times `dim` numbers: what is behind the
    first `dim` is of n-grams alone, for another place in the model.
    """

    def __init__(
        self, dim: int, sizes: tuple[int, ...], functions: int, rows: int, parts: int = 1, vocabulary: int = VOCAB
    ) -> None:
        super().__init__()
        self.sizes, self.functions, self.rows, self.parts, self.vocabulary = sizes, functions, rows, parts, vocabulary
        self.reach = max(sizes, default=1) - 1
        self.byte = nn.Embedding(vocabulary, dim)
        # All tables in one, by function and then size, so that one gather looks up all.
        self.ngram: nn.Embedding | StoredTable | None = (
            nn.Embedding(functions * len(sizes) * rows, parts * dim) if sizes else None
        )
        self.sparse = False
        """See `LookupTable`."""
        self.kept: RowGradients | None = None
        """See `LookupTable`."""
        self.on_host = False
        """See `LookupTable`."""
        self.rows_over: ShardedRows | None = None
        """The way to rows that other processes hold, where the tables are sharded."""
        self.dropout = 0.0
        """Probability of an id to lose its n-grams in training, against overfitting."""

    @property
    def weight(self) -> Tensor:
        """The tables; a DTensor where they are sharded."""
        assert self.ngram is not None
        return self.ngram.weight

    @property
    def held(self) -> Tensor:
        """See `LookupTable`."""
        return self.weight if self.rows_over is None else self.rows_over.held

    def shard(self, mesh: DeviceMesh) -> None:
        """See `LookupTable`."""
        assert isinstance(self.ngram, nn.Embedding)
        self.ngram.weight = nn.Parameter(empty_rows(self.weight, mesh))
        self.rows_over = ShardedRows(self.ngram.weight)

    @property
    def lookups(self) -> int:
        """See `LookupTable`."""
        return self.functions * len(self.sizes)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NgramEmbedding:
        """Keeps tables on the host, in the model's dtype, where `on_host`; those that are sharded where they are."""
        if self.rows_over is None and (not self.on_host or self.ngram is None or self.weight.is_meta):
            return super()._apply(fn, recurse)
        self.byte._apply(fn, recurse)
        if self.ngram is None or self.rows_over is not None:
            return self
        with torch.no_grad():
            self.ngram.weight.data = self.weight.to(fn(torch.empty(0, dtype=self.weight.dtype)).dtype)
        return self

    def initial_state(self, batch: int) -> Int[Tensor, "batch reach"]:
        """The ids before the first: PAD."""
        return torch.full((batch, self.reach), PAD)

    def hashes(
        self, ids: Int[Tensor, "batch new"], starts: Bool[Tensor, "batch new"], recent: Int[Tensor, "batch reach"]
    ) -> Int[Tensor, "batch new tables"]:
        """The table row of every n-gram that ends at each new id, on the device of the ids."""
        if device := fused.kernels(ids):
            shape = (self.rows, PRIMES[: self.functions], self.sizes)
            return device.hashes(ids, starts, recent, *shape, OFFSET=PUBLISHED_OFFSET, PAD=PAD, VOCAB=self.vocabulary)
        new = ids.shape[1]
        ids = torch.cat([recent, ids], 1)
        ago = torch.arange(self.reach + 1, device=ids.device)
        back = torch.arange(new, device=ids.device)[:, None] + self.reach - ago
        window = ids[:, back]  # [batch, new, reach + 1], newest first
        # An id belongs to the document if no start is after it and at or before the byte to embed.
        document = torch.cat([starts.new_zeros(starts.shape[0], self.reach), starts], 1).long().cumsum(1)
        inside = document[:, back] == document[:, back[:, :1]]
        published = (torch.where(inside, window, PAD) + PUBLISHED_OFFSET) % self.vocabulary
        found: list[Tensor] = []
        for prime in PRIMES[: self.functions]:
            for size in self.sizes:
                hashed = published[..., size - 1]
                power = 1
                for k in range(1, size):
                    power = wrap(power * prime)
                    hashed = hashed + published[..., size - 1 - k] * power
                found.append(hashed % self.rows + len(found) * self.rows)
        return torch.stack(found, -1)

    def hashes_on_host(self, ids: Tensor, starts: Tensor, recent: Tensor) -> Int[Tensor, "batch new tables"] | None:
        """`hashes` of ids on the host, for tables that stay there; else None."""
        return self.hashes(ids, starts, recent) if self.on_host and self.ngram is not None else None

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        starts: Bool[Tensor, "batch new"],
        recent: Int[Tensor, "batch reach"],
        index: Int[Tensor, "batch new tables"] | None = None,
    ) -> Float[Tensor, "batch new width"]:
        """The embeddings of new ids, on one device. `starts`: where documents start; `index`: `hashes_on_host`."""
        x = self.byte(ids)
        x = x if self.parts == 1 else F.pad(x, (0, (self.parts - 1) * x.shape[-1]))
        if self.ngram is None:
            return x
        index = self.hashes(ids, starts, recent) if index is None else index
        found = sent(self.looked_up(index.flatten(0, 1)), x.device).view(x.shape)
        if self.training and self.dropout:
            found = found * F.dropout(x.new_ones(*x.shape[:-1], 1), self.dropout)
        return x + found

    def looked_up(self, index: Int[Tensor, "bytes tables"]) -> Float[Tensor, "bytes dim"]:
        """The sum of each byte's rows."""
        assert self.ngram is not None
        if isinstance(self.ngram, StoredTable):
            return self.ngram.summed(index)
        if self.rows_over is not None:
            return self.rows_over.looked_up(index, self.kept)
        if self.kept is not None:
            return bags(self.ngram.weight, index, self.kept)
        if not torch.is_grad_enabled():
            return sum_rows(self.ngram.weight, index)
        if self.sparse and fused.bags_fit(self.ngram.weight):
            return fused.bags(self.ngram.weight, index)
        return F.embedding_bag(index, self.ngram.weight, mode="sum", sparse=self.sparse)

    def reached(
        self, rows: Rows, starts: Bool[Tensor, "batch new"], recent: Int[Tensor, "batch reach"]
    ) -> Int[Tensor, "batch reach"]:
        """The ids that later n-grams reach, on the host; PAD for those of an earlier document."""
        if not self.reach:
            return recent
        ids = torch.cat([recent, rows.ids], 1)
        document = torch.cat([starts.new_zeros(starts.shape[0], self.reach), starts], 1).long().cumsum(1)
        ends = self.reach + rows.lengths
        newest = tail(document, ends, 1)
        return torch.where(tail(document, ends, self.reach) == newest, tail(ids, ends, self.reach), PAD)


def wrap(value: int) -> int:
    """A Python integer in 64-bit two's-complement arithmetic."""
    return (value + 2**63) % 2**64 - 2**63


def hash_powers(embed: NgramEmbedding) -> NDArray[np.int64]:
    """prime^k of each hash function `[functions, k]`, in wrapping 64-bit arithmetic."""
    longest = embed.reach + 1
    return np.array([[wrap(prime**k) for k in range(longest)] for prime in PRIMES[: embed.functions]], np.int64)
