"""Weights of linear layers: whether they were changed, and rounded to int8."""

from __future__ import annotations

from ctypes import c_int64, c_void_p, create_string_buffer
from hashlib import blake2b

import torch
from torch import Tensor

from bytelm.native.library import library

SUMS = 256  # bytes of bytelm_checksum's result
PIECE = 1 << 18  # numbers that are rounded together, which stay in the caches


def checksum(tensor: Tensor) -> bytes:
    """A 16-byte checksum of a CPU tensor, at memory bandwidth where there are kernels.

    `_version` would not do: `weight.data += change`, as peft merges adapters, does not count as one.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    functions = library("kernels")
    if functions is None:
        return blake2b(data.numpy().tobytes(), digest_size=16).digest()
    sums = create_string_buffer(SUMS)
    functions.bytelm_checksum(c_void_p(data.data_ptr()), c_int64(len(data)), sums)
    return blake2b(sums.raw, digest_size=16).digest()


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `[out, in]` in int8, symmetric, and the float32 scale of each row, whose largest entry is 127."""
    whole, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    rows = max(1, PIECE // max(1, weight.shape[1]))
    for part, to, factor in zip(weight.split(rows), whole.split(rows), scale.split(rows), strict=True):
        part = part.to(torch.float32)
        factor.copy_(part.abs().amax(1).clamp_(min=1e-30).div_(127))
        to.copy_((part / factor[:, None]).round_())
    return whole, scale
