"""Where patches open in rows that are being generated: the scheme's rule, its scorer, and what was decided."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch

from bytelm.decoding.base import Backend, New, Reals
from bytelm.decoding.transformer import TransformerDecoder
from bytelm.device import full_float32
from bytelm.models.transformer import ByteTransformer
from bytelm.native import kernels as native
from bytelm.native.kernels import Kernels, address, tokens
from bytelm.patching.base import SPARED, Patcher
from bytelm.patching.entropy import Entropy
from bytelm.patching.fixed import Fixed
from bytelm.patching.space import Space
from bytelm.scorers import ngram
from bytelm.scorers.ngram import NgramScorer
from bytelm.scorers.transformer import TransformerScorer
from bytelm.transfer import to_host
from bytelm.units import BYTES, EOS, PAD

RULES = {"threshold": 2, "rise": 3, "both": 4}


@runtime_checkable
class Uncertainty(Protocol):
    """A scorer over rows."""

    def entropies(self, new: New, history: native.History) -> Reals:
        """The entropy in nats of what follows each new id."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes."""
        ...

    def traffic(self, length: int) -> float:
        """See `Decoder`."""
        ...


class TransformerEntropies:
    """A byte Transformer's: it runs once a byte, in float32 whatever the model's weights are."""

    def __init__(self, model: ByteTransformer, kernels: Backend, rows: int, capacity: int) -> None:
        self.kernels, self.decoder = kernels, TransformerDecoder(model, kernels, rows, capacity)

    def entropies(self, new: New, history: native.History) -> Reals:
        """See `Uncertainty`."""
        with full_float32():
            return self.kernels.entropies(self.decoder.after(new))

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes."""
        return self.decoder.row_bytes

    def traffic(self, length: int) -> float:
        """See `Decoder`."""
        return self.decoder.traffic(length)


class NgramEntropies:
    """A table's: looked up."""

    row_bytes = 0

    def __init__(self, scorer: NgramScorer, kernels: Kernels) -> None:
        self.kernels, self.tables = (
            kernels,
            np.ascontiguousarray(to_host(scorer.tables.detach()).to(torch.float32).numpy()),
        )
        config = scorer.config
        newline = ngram.NEWLINE if config.reset_newline else -1
        shape = (config.order, config.rows, ngram.MULTIPLIER, BYTES, newline, PAD)
        self.scorer = native.Counted(address(self.tables), *shape)

    def entropies(self, new: New, history: native.History) -> Reals:
        """See `Uncertainty`."""
        return self.kernels.counted(self.scorer, history, tokens(new.row, new.position))

    def traffic(self, length: int) -> float:
        """See `Decoder`; a few entries of tables."""
        return 0.0


def known(patcher: Patcher) -> bool:
    """Whether the kernels know the scheme and its scorer."""
    scorers = (TransformerScorer, NgramScorer)
    return type(patcher) in (Fixed, Space) or (type(patcher) is Entropy and type(patcher.scorer) in scorers)


class Patches:
    """What a patcher decides about rows, by position. `ids` are those that the rows have read, `[rows, capacity]`."""

    def __init__(self, patcher: Fixed | Space | Entropy, kernels: Backend, ids: np.ndarray) -> None:
        rows, capacity = ids.shape
        self.kernels = kernels.host
        self.history = native.History(address(ids), capacity, PAD)
        self.closed, self.first, gap, run = (np.zeros(ids.shape, np.int64) for _ in range(4))
        """How many patches are whole once this id is read; where the patch of the next id begins."""
        self.scorer: Uncertainty | None = None
        scheme, threshold, rise = 0, 0.0, 0.0
        spacelike = entropy = None
        if isinstance(patcher, Space):
            scheme, spacelike = 1, np.ascontiguousarray(to_host(patcher.table).numpy().astype(np.uint8))
        if isinstance(patcher, Entropy):
            config = patcher.config
            scheme, threshold, rise = RULES[config.rule], config.threshold or 0.0, config.rise or 0.0
            entropy = self.kernels.zeros(rows, capacity)
            self.scorer = self.uncertainty(patcher.scorer, kernels, rows, capacity)
        guard = patcher.guard
        self.longest = guard.max_length
        bounds = (guard.max_length or 0, guard.max_singles or 0, SPARED, EOS)
        by_position = (gap, run, self.closed, self.first, entropy)
        self.held = (spacelike, *by_position, ids)
        self.rule = native.Rule(scheme, threshold, rise, *bounds, address(spacelike), *map(address, by_position))

    @staticmethod
    def uncertainty(scorer: object, kernels: Backend, rows: int, capacity: int) -> Uncertainty:
        """A scorer over rows."""
        if isinstance(scorer, NgramScorer):
            return NgramEntropies(scorer, kernels.host)
        assert isinstance(scorer, TransformerScorer)
        return TransformerEntropies(scorer.model, kernels, rows, capacity)

    def decide(self, new: New) -> None:
        """Read new ids, and write down where patches open after them."""
        entropy = self.scorer.entropies(new, self.history) if self.scorer else None
        self.kernels.decide(self.rule, self.history, tokens(new.row, new.position), entropy)

    def stay(self, new: New) -> None:
        """Write down that no patch opens after new ids, of each row one."""
        before = np.maximum(new.position - 1, 0)
        self.closed[new.row, new.position] = self.closed[new.row, before]
        self.first[new.row, new.position] = self.first[new.row, before]

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes."""
        own = sum(x[0].nbytes for x in self.held[1:] if x is not None)
        return own + (self.scorer.row_bytes if self.scorer else 0)
