"""Patch boundaries during decoding: the scheme's rule, its entropy model, and the decisions by position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bytelm.find import part_of
from bytelm.interfaces.decoder import Backend, EntropyDecoder, NewTokens
from bytelm.native import kernels as native
from bytelm.native.kernels import address, tokens
from bytelm.patching.base import SPARED, Patcher
from bytelm.patching.entropy import Entropy
from bytelm.patching.fixed import Fixed
from bytelm.patching.space import Space
from bytelm.transfer import to_host
from bytelm.units import EOS, PAD

RULES = {"threshold": 2, "relative": 3, "both": 4}


def known(patcher: Patcher) -> bool:
    """Whether the kernels support the scheme and its entropy model."""
    if type(patcher) is Entropy:
        return part_of(patcher.entropy_model, "entropy_decoder") is not None
    return type(patcher) in (Fixed, Space)


class Patches:
    """The decisions of a patcher by position. `ids` [rows, capacity] are those that the rows have read."""

    def __init__(self, patcher: Fixed | Space | Entropy, kernels: Backend, ids: np.ndarray) -> None:
        rows, capacity = ids.shape
        self.kernels = kernels.host
        self.history = native.History(address(ids), capacity, PAD)
        self.closed, self.first, gap, run = (np.zeros(ids.shape, np.int64) for _ in range(4))
        """Complete patches once this id is read; where the patch of the next id starts."""
        self.entropy_model: EntropyDecoder | None = None
        scheme, threshold, relative_threshold = 0, 0.0, 0.0
        spacelike = entropy = None
        if isinstance(patcher, Space):
            scheme, spacelike = 1, np.ascontiguousarray(to_host(patcher.table).numpy().astype(np.uint8))
        if isinstance(patcher, Entropy):
            config = patcher.config
            scheme, threshold, relative_threshold = (
                RULES[config.rule],
                config.threshold or 0.0,
                config.relative_threshold or 0.0,
            )
            entropy = self.kernels.zeros(rows, capacity)
            entropy_decoder = part_of(patcher.entropy_model, "entropy_decoder")
            assert entropy_decoder is not None  # `known`
            self.entropy_model = entropy_decoder.build(patcher.entropy_model, kernels, rows, capacity)
        guard = patcher.guard
        self.longest = guard.max_length
        bounds = (guard.max_length or 0, guard.max_single_byte_run or 0, SPARED, EOS)
        by_position = (gap, run, self.closed, self.first, entropy)
        self.held = (spacelike, *by_position, ids)
        self.rule = native.Rule(
            scheme, threshold, relative_threshold, *bounds, address(spacelike), *map(address, by_position)
        )

    def decide(self, new: NewTokens) -> None:
        """Read new ids, and store the boundaries after them."""
        if new.opens is not None:
            self.given(new, new.opens)
            return
        entropy = self.entropy_model.entropies(new, self.history) if self.entropy_model else None
        self.kernels.decide(self.rule, self.history, tokens(new.row, new.position), entropy)

    def given(self, new: NewTokens, opens: NDArray[np.bool_]) -> None:
        """Store boundaries that were decided before, and those that every scheme has (`layout.forced_openings`)."""
        opens = opens | (new.position == 0) | (new.ids == EOS)
        begins = np.flatnonzero(np.diff(new.row, prepend=-1))
        for part in map(slice, begins, [*begins[1:], len(new.row)]):
            row, position, opened = new.row[part.start], new.position[part], opens[part]
            before = position[0] - 1
            closed, first = (self.closed[row, before], self.first[row, before]) if before >= 0 else (0, 0)
            self.closed[row, position] = closed + np.cumsum(opened)
            self.first[row, position] = np.maximum.accumulate(np.where(opened, position + 1, first))

    def stay(self, new: NewTokens) -> None:
        """Store that no patch starts after new ids, one per row."""
        before = np.maximum(new.position - 1, 0)
        self.closed[new.row, new.position] = self.closed[new.row, before]
        self.first[new.row, new.position] = self.first[new.row, before]

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        own = sum(x[0].nbytes for x in self.held[1:] if x is not None)
        return own + (self.entropy_model.row_bytes if self.entropy_model else 0)
