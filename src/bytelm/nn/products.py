"""Linear layers: the matmuls that `nn.fused` leaves to a library, and which one that is."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.nn import fused


class Linear(nn.Linear):
    """x · weightᵀ, without a bias."""

    def __init__(self, given: int, found: int, *, halves: bool = False) -> None:
        super().__init__(given, found, bias=False)
        self.halves = halves
        """Whether it is two layers one above the other, which kernels compute in turn."""

    def forward(self, input: Float[Tensor, "... given"]) -> Float[Tensor, "... found"]:
        """The products of each line with the rows of the weight."""
        return product(input, self.weight)


def product(x: Float[Tensor, "... given"], weight: Float[Tensor, "found given"]) -> Float[Tensor, "... found"]:
    """The same by the faster of torch's two libraries."""
    return fused.product(x, weight) if fused.multiplies(x, weight) else F.linear(x, weight)
