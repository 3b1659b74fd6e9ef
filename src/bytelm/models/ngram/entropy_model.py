"""An entropy model by counting: tables of next-byte entropies by context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.patching.layout import Rows, tail
from bytelm.units import BYTES, PAD

NEWLINE = ord("\n")
MULTIPLIER = 1_000_000_007
UNSEEN = -1.0  # no entropy is negative


@dataclass(frozen=True)
class Config:
    """`order`: bytes of context. `rows`: entries of each table that contexts are hashed into.

    `reset_newline`: contexts do not cross newlines.
    """

    order: int = 4
    rows: int = 65536
    reset_newline: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 8:
            raise ConfigError(f"entropy_model.order = {self.order}: from 1 to 8 bytes")
        if not 256 <= self.rows <= 2**20:
            raise ConfigError(f"entropy_model.rows = {self.rows}: from 256 to {2**20}")

    def counting(self, bytes: int) -> int:
        """Peak memory of counting so many bytes, in bytes: a table of counts, and their contexts."""
        return self.rows * BYTES * 28 + bytes * (16 + 32 * self.order)

    def build(self) -> NgramEntropyModel:
        """The entropy model, with empty tables."""
        return NgramEntropyModel(self)


@dataclass(frozen=True)
class NgramState:
    """The last ids of each row, PAD where there are none."""

    recent: Int[Tensor, "batch order"]


class NgramEntropyModel(nn.Module):
    """A table of entropies per context length; the longest context that was counted applies, else the maximum."""

    tables: Tensor
    """`[order, rows]`, from one byte of context on; UNSEEN where no context was seen."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("tables", torch.full((config.order, config.rows), UNSEEN))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NgramEntropyModel:
        """Keeps the tables on the host, in float32, whatever the device and dtype of the model."""
        return super()._apply(fn, recurse) if self.tables.is_meta else self

    @property
    def weights(self) -> NgramEntropyModel:
        """The module that checkpoints contain."""
        return self

    def fit(self, documents: Callable[[], Sequence[NDArray[np.uint8]]], train: Callable[..., None]) -> None:
        """Count the documents; nothing is trained."""
        self.count(documents())

    def initial_state(self, batch: int) -> NgramState:
        """See `EntropyModel`."""
        return NgramState(torch.full((batch, self.config.order), PAD))

    @torch.no_grad()
    def entropies(
        self, ids: Int[Tensor, "batch new"], state: NgramState
    ) -> tuple[Float[Tensor, "batch new"], NgramState]:
        """See `EntropyModel`."""
        rows = Rows.of(ids)
        line = torch.cat([state.recent, rows.ids], 1)
        order = self.config.order
        contexts = self.clear(line.unfold(1, order, 1)[:, 1:].flip(-1))
        entropy = torch.full(ids.shape, math.log(BYTES))
        for length, table in enumerate(self.tables, 1):
            found = table[keys(contexts[..., :length], self.config.rows)]
            entropy = torch.where(found == UNSEEN, entropy, found)
        return rows.restore(entropy), NgramState(tail(line, order + rows.lengths, order))

    def clear(self, contexts: Int[Tensor, "... order"]) -> Int[Tensor, "... order"]:
        """Contexts, newest id first, cut before a special id, or before a newline that resets."""
        ends: Bool[Tensor, "... order"] = contexts >= BYTES
        if self.config.reset_newline:
            ends = ends | (contexts == NEWLINE)
        return torch.where(ends.long().cumsum(-1) - ends.long() > 0, PAD, contexts)

    @torch.no_grad()
    def count(self, documents: Sequence[NDArray[np.uint8]]) -> None:
        """Fill the tables from documents. Each context's counts are smoothed with those of its suffix.

        Witten-Bell: p_n(b) = (count_n(b) + kinds_n · p_{n-1}(b)) / (total_n + kinds_n), down to the uniform
        distribution.
        """
        order, rows = self.config.order, self.config.rows
        between = np.full(order, PAD, np.int64)
        stream = [between, *(x for document in documents for x in (document.astype(np.int64), between))]
        ids = torch.from_numpy(np.concatenate(stream))
        contexts = self.clear(ids.unfold(0, order, 1)[:-1].flip(-1))
        target = ids[order:]
        contexts, target = contexts[target < BYTES], target[target < BYTES]
        parent, chances = torch.zeros_like(target), torch.full((1, BYTES), 1.0 / BYTES)
        for length in range(1, order + 1):
            key = keys(contexts[:, :length], rows)
            seen = torch.zeros(rows, dtype=torch.bool).scatter(0, key, True)
            index, some = (seen.cumsum(0) - 1)[key], int(seen.sum())  # of few documents most rows are unused
            counts = torch.bincount(index * BYTES + target, minlength=some * BYTES).view(some, BYTES).float()
            kinds, total = (counts > 0).sum(1, keepdim=True), counts.sum(1, keepdim=True)
            # All contexts of a row have the same suffix, except for collisions: any of them represents it.
            backed = chances[torch.zeros(some, dtype=torch.long).scatter(0, index, parent)]
            chances = (counts + kinds * backed) / (total + kinds)
            self.tables[length - 1] = UNSEEN
            self.tables[length - 1, seen] = torch.special.entr(chances).sum(1)
            parent = index


def keys(contexts: Int[Tensor, "... order"], rows: int) -> Int[Tensor, "..."]:
    """The table row of each context, newest id first, in wrapping 64-bit arithmetic."""
    key = torch.zeros_like(contexts[..., 0])
    for index in range(contexts.shape[-1]):
        key = key * MULTIPLIER + contexts[..., index] + 1
    return (key ^ (key >> 29)) % rows
