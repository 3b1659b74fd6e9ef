"""Models whose every answer is known, and columns of them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.interfaces.model import ByteModel
from bytelm.robust.columns import Column
from bytelm.testing.tiny import UniformModel
from bytelm.units import BYTES, VOCAB


class Counts(UniformModel):
    """Bytes have given probabilities, whatever was before (order 0)."""

    def __init__(self, weights: dict[int, float], otherwise: float) -> None:
        super().__init__()
        line = torch.full((VOCAB,), otherwise)
        line[list(weights)] = torch.tensor(list(weights.values()))
        line[BYTES:] = 0
        self.line = nn.Parameter((line / line.sum()).log(), requires_grad=False)

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], None]:
        return self.line.expand(*ids.shape, VOCAB), None


class Next(UniformModel):
    """After byte b comes b + 1, with odds of e^5 to 1 against each other id: order 1, so that the prefix matters."""

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], None]:
        wanted = torch.where(ids < BYTES, (ids + 1) % BYTES, 0)
        return 5.0 * nn.functional.one_hot(wanted, VOCAB).float(), None


def column(model: ByteModel, name: str = "model", context: int = 64, **more: Any) -> Column:
    return Column(name, name, model, context, **more)
