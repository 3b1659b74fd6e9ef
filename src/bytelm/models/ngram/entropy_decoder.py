"""Entropies of the n-gram entropy model during decoding."""

from __future__ import annotations

import numpy as np
import torch

from bytelm.interfaces.decoder import Backend, NewTokens, Reals
from bytelm.models.ngram.entropy_model import MULTIPLIER, NEWLINE, NgramEntropyModel
from bytelm.native import kernels as native
from bytelm.native.kernels import address, tokens
from bytelm.transfer import to_host
from bytelm.units import BYTES, PAD


class NgramEntropies:
    """See `interfaces.decoder.EntropyDecoder`."""

    row_bytes = 0

    def __init__(self, entropy_model: NgramEntropyModel, kernels: Backend, rows: int, capacity: int) -> None:
        self.kernels = kernels.host
        self.tables = np.ascontiguousarray(to_host(entropy_model.tables.detach()).to(torch.float32).numpy())
        config = entropy_model.config
        newline = NEWLINE if config.reset_newline else -1
        shape = (config.order, config.rows, MULTIPLIER, BYTES, newline, PAD)
        self.entropy_model = native.Counted(address(self.tables), *shape)

    def entropies(self, new: NewTokens, history: native.History) -> Reals:
        """See `EntropyDecoder`."""
        return self.kernels.counted(self.entropy_model, history, tokens(new.row, new.position))

    def traffic(self, length: int) -> float:
        """See `Decoder`; a few entries of tables."""
        return 0.0


build = NgramEntropies
