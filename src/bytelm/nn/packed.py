"""Linear layers of a model that was loaded for inference: their weights exist only as the kernels read them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bytelm.errors import UsageError
from bytelm.native import packing
from bytelm.native.kernels import Kernels
from bytelm.native.packing import PANEL, Matrix
from bytelm.nn.products import Linear


class PackedLinear(Linear):
    """`Linear` on the host in float32, without gradients; decoders take the matrix by `weight` (`native.packing`)."""

    def __init__(self, given: int, found: int, matrix: Matrix, *, halves: bool = False) -> None:
        """`matrix`: the weight `[found, given]` as `packing.packed` makes it."""
        with torch.device("meta"):
            super().__init__(given, found, halves=halves)
        self.weight.requires_grad_(False)
        packing.hold(self.weight, matrix)
        self.matrix = matrix

    def forward(self, input: Float[Tensor, "... given"]) -> Float[Tensor, "... found"]:
        """The products of each line with the rows of the weight. Raises UsageError where gradients are wanted."""
        if input.requires_grad and torch.is_grad_enabled():
            raise UsageError("a model with packed weights is for inference: load it without `weights` to train it")
        lines = input.detach().to(torch.float32).reshape(-1, input.shape[-1]).contiguous()
        found = torch.from_numpy(Kernels.open().linear(self.matrix, lines.numpy()))
        if self.halves:  # the panels of both lie in turn
            half = self.out_features // 2
            found = found.view(len(found), -1, 2, PANEL).transpose(1, 2).reshape(len(found), 2, -1)[..., :half]
        return found.reshape(*input.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """Itself: it does not change."""
        return self
