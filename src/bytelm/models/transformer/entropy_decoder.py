"""Entropies of the Transformer entropy model during decoding: one step per byte, in float32."""

from __future__ import annotations

from bytelm.device import full_float32
from bytelm.interfaces.decoder import Backend, NewTokens, Reals
from bytelm.models.transformer.decoder import TransformerDecoder
from bytelm.models.transformer.entropy_model import TransformerEntropyModel
from bytelm.native.kernels import History


class TransformerEntropies:
    """See `interfaces.decoder.EntropyDecoder`."""

    def __init__(self, entropy_model: TransformerEntropyModel, kernels: Backend, rows: int, capacity: int) -> None:
        self.kernels, self.decoder = kernels, TransformerDecoder(entropy_model.model, kernels, rows, capacity)

    def entropies(self, new: NewTokens, history: History) -> Reals:
        """See `EntropyDecoder`."""
        with full_float32():
            return self.kernels.entropies(self.decoder.logits_after(new))

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.decoder.row_bytes

    def traffic(self, length: int) -> float:
        """See `Decoder`."""
        return self.decoder.traffic(length)


build = TransformerEntropies
