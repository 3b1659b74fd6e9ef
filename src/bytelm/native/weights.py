"""Weights of linear layers: whether they were changed, and rounded to int8."""

from __future__ import annotations

from ctypes import c_int64, c_void_p, create_string_buffer
from hashlib import blake2b

import torch
from torch import Tensor

from bytelm.native.library import library

SUMS = 256  # bytes of bytelm_checksum's result


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
    """A weight `[out, in]` in int8, and the float32 scale of each row."""
    weight = weight.to(torch.float32)
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale
