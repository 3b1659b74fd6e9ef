"""The BLT paper's entropy model: a small windowed byte Transformer, trained on the same data (section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.device import full_float32
from bytelm.models.transformer import model as transformer
from bytelm.models.transformer.model import ByteTransformer, TransformerState
from bytelm.nn import fused
from bytelm.transfer import to_host


@dataclass(frozen=True)
class Config:
    """Shape of the entropy model; gains beyond a window of 512 bytes are small (paper, figure 8).

    `reset_newline` resets its context at each newline, which keeps repetitive text from drifting into ever
    longer patches (paper, section 4.4).
    """

    layers: int = 2
    dim: int = 64
    heads: int = 4
    attention_window: int = 64
    theta: float = 10_000.0
    ffn_multiple: int = 64
    reset_newline: bool = False
    ffn_dim: int | None = None
    """See `models.transformer.Config`."""

    def __post_init__(self) -> None:
        self.shape()  # validates

    def shape(self) -> transformer.Config:
        """The byte Transformer inside."""
        shape = (
            self.layers,
            self.dim,
            self.heads,
            self.attention_window,
            self.theta,
            self.ffn_multiple,
            self.reset_newline,
        )
        return transformer.Config(*shape, ffn_dim=self.ffn_dim)

    def counting(self, bytes: int) -> int:
        """Peak memory of counting: nothing is counted."""
        return 0

    def build(self) -> TransformerEntropyModel:
        """The entropy model, parameters uninitialised."""
        return TransformerEntropyModel(self)


class TransformerEntropyModel(nn.Module):
    """The entropy of a byte Transformer's prediction over all ids, always in float32, without TF32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = config.shape().build()

    @property
    def weights(self) -> ByteTransformer:
        """The module that checkpoints contain."""
        return self.model

    def fit(self, documents: object, train: Callable[[ByteTransformer], None]) -> None:
        """Train the model; `documents` are not used."""
        train(self.model)

    def initial_state(self, batch: int) -> TransformerState:
        """See `EntropyModel`."""
        return self.model.initial_state(batch)

    @torch.no_grad()
    def entropies(
        self, ids: Int[Tensor, "batch new"], state: TransformerState
    ) -> tuple[Float[Tensor, "batch new"], TransformerState]:
        """See `EntropyModel`."""
        with torch.autocast(self.model.device.type, enabled=False), full_float32(), fused.plain():
            logits, after = self.model(ids, state)
            logprobs = F.log_softmax(logits, -1)
        assert after is not None
        return to_host(-(logprobs.exp() * logprobs).sum(-1)), after
