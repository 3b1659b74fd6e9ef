"""Decoder of PerceiverAR: embedding, cross-attention to all inputs, layers over latents, head."""

from __future__ import annotations

from typing import Any

import numpy as np

from bytelm.interfaces.decoder import Backend, Decoder, NewTokens
from bytelm.models.perceiver.model import PerceiverAR
from bytelm.nn.norm import EPS


class PerceiverDecoder(Decoder):
    """See `Decoder`; caches hold the inputs of a document, and the latents of its newest block."""

    def __init__(self, model: PerceiverAR, kernels: Backend, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity, kernels)
        self.kernels = kernels
        self.block = model.config.latents
        self.table = kernels.table(model.embedding.weight)
        self.cross = kernels.layers(model.cross, rows, capacity)
        self.latents = kernels.layers(model.latents, rows, min(capacity, self.block + self.chunk))
        self.norm, self.head = kernels.vector(model.norm.weight), kernels.matrix(model.head.weight)

    def logits_after(self, new: NewTokens) -> Any:
        """See `Decoder`."""
        x = self.kernels.embed(self.table, new.ids)
        x = self.cross.run(x, new.row, new.position, np.zeros_like(new.row))
        x = self.latents.run(x, new.row, new.position, new.position - new.position % self.block)
        return self.kernels.linear(self.head, x, self.norm, EPS)

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.cross.row_bytes + self.latents.row_bytes + self.ids[0].nbytes

    def traffic(self, length: int) -> float:
        """See `Decoder`; in the middle of a block."""
        cached = length * self.cross.slot_bytes + min(length, self.block / 2) * self.latents.slot_bytes
        return self.cross.weight_bytes + self.latents.weight_bytes + self.head.bytes + self.rows * cached


def unsupported(model: PerceiverAR) -> str:
    """See `models.blt.decoder`."""
    return ""


build = PerceiverDecoder
