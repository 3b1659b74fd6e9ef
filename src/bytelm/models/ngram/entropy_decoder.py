"""The entropies of counted n-grams in rows: looked up."""

from __future__ import annotations

import numpy as np
import torch

from bytelm.interfaces.decoder import Backend, New, Reals
from bytelm.models.ngram.entropy_model import MULTIPLIER, NEWLINE, NgramScorer
from bytelm.native import kernels as native
from bytelm.native.kernels import address, tokens
from bytelm.transfer import to_host
from bytelm.units import BYTES, PAD


class NgramEntropies:
    """See `interfaces.decoder.EntropyDecoder`."""

    row_bytes = 0

    def __init__(self, scorer: NgramScorer, kernels: Backend, rows: int, capacity: int) -> None:
        self.kernels = kernels.host
        self.tables = np.ascontiguousarray(to_host(scorer.tables.detach()).to(torch.float32).numpy())
        config = scorer.config
        newline = NEWLINE if config.reset_newline else -1
        shape = (config.order, config.rows, MULTIPLIER, BYTES, newline, PAD)
        self.scorer = native.Counted(address(self.tables), *shape)

    def entropies(self, new: New, history: native.History) -> Reals:
        """See `EntropyDecoder`."""
        return self.kernels.counted(self.scorer, history, tokens(new.row, new.position))

    def traffic(self, length: int) -> float:
        """See `Decoder`; a few entries of tables."""
        return 0.0


build = NgramEntropies
