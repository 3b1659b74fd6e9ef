"""Float64 throughout, so that a difference is an error and not rounding."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from bytelm.interfaces.model import ByteModel


@contextmanager
def exact(model: ByteModel) -> Generator[ByteModel]:
    """A copy of the model, its patcher included, that computes in float64 as long as the block lasts.

    `x.float()`, by which models keep some steps out of bfloat16, gives float64 there too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(Tensor, "float", Tensor.double):
            yield copy.deepcopy(model).double()
    finally:
        torch.set_default_dtype(before)
