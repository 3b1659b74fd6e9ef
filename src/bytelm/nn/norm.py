"""Root-mean-square normalisation, computed in the precision of its weight whatever arrives."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.nn import fused

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = EPS) -> None:
        super().__init__(dim, eps)
        self.least = eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Under autocast some inputs are bf16; the norm is not, though its result may be: a product reads it next."""
        if fused.norm_fits(x) and self.weight.dtype == torch.float32:
            return fused.rms_norm(x, self.weight, self.least)
        if (device := fused.kernels(x)) and fused.rounds(x):
            return device.rms_norm(x, self.weight, self.least, torch.bfloat16)
        return super().forward(x.to(self.weight.dtype))
