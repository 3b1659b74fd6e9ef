"""Decoder of the byte Transformer: embedding, stack, head."""

from __future__ import annotations

from typing import Any

import numpy as np

from bytelm.interfaces.decoder import Backend, Decoder, NewTokens, Wanted, with_ngrams
from bytelm.models.transformer.model import NEWLINE, ByteTransformer
from bytelm.nn.norm import EPS

RUN = 1 << 40  # larger than any position


class TransformerDecoder(Decoder):
    """See `Decoder`."""

    prefills = True

    def __init__(self, model: ByteTransformer, kernels: Backend, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity, kernels)
        config, self.kernels = model.config, kernels
        self.tokens = model.tokens
        self.attention_window = config.attention_window
        self.table = kernels.table(model.vectors)
        self.ngrams = None if model.ngrams is None else kernels.hashed(model.ngrams, self.ids)
        self.layers = kernels.layers(
            model.stack, rows, min(capacity, (config.attention_window or capacity) + self.chunk)
        )
        self.norm, self.head = kernels.vector(model.norm.weight), kernels.matrix(model.head.weight)
        self.start = np.zeros((rows, capacity), np.int64) if config.reset_newline else None

    def logits_after(self, new: NewTokens) -> Any:
        """See `Decoder`."""
        return self.wanted_logits(new, None)

    def wanted_logits(self, new: NewTokens, wanted: Wanted | None) -> Any:
        """See `Decoder`."""
        x, beyond = with_ngrams(self.kernels.embed(self.table, new.ids), self.ngrams, new)
        start = np.zeros_like(new.row) if self.start is None else self.lines(new, self.start)
        x = self.layers.run(x, new.row, new.position, start, wanted=wanted)
        if beyond is not None:
            x = x + (beyond if wanted is None else beyond[wanted])
        return self.kernels.linear(self.head, x, self.norm, EPS)

    @staticmethod
    def lines(new: NewTokens, start: np.ndarray) -> np.ndarray:
        """The newest newline at or before each new position, stored by position."""
        first = np.ones(len(new.row), bool)
        first[1:] = new.row[1:] != new.row[:-1]
        before = np.where(new.position > 0, start[new.row, new.position - 1], 0)
        found = np.where(new.ids == NEWLINE, new.position, np.where(first, before, -1))
        run = np.cumsum(first) * RUN
        found = np.maximum.accumulate(found + run) - run
        start[new.row, new.position] = found
        return found

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.layers.row_bytes + (1 + (self.start is not None)) * self.ids[0].nbytes

    def traffic(self, length: int) -> float:
        """See `Decoder`."""
        cached = min(length, self.attention_window or length) * self.layers.slot_bytes
        return self.layers.weight_bytes + self.head.bytes + self.rows * cached


build = TransformerDecoder
