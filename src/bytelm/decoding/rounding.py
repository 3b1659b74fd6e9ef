"""Quantized weights: a model as a decoder with `quantize` computes it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bytelm.interfaces.model import ByteModel
from bytelm.native.weights import quantised


@torch.no_grad()
def rounded(model: ByteModel, weights: str) -> ByteModel:
    """A copy with linear layers quantized to "bf16" or "int8" and restored; the patcher is unchanged.

    int8: symmetric, one scale per output channel, whose largest entry is 127.
    """
    found = copy.deepcopy(model)
    spared = set[nn.Module]() if found.patcher is None else set(found.patcher.modules())
    for module in found.modules():
        if isinstance(module, nn.Linear) and module not in spared:
            module.weight.copy_(restored(module.weight, weights))
    return found


def restored(weight: torch.Tensor, weights: str) -> torch.Tensor:
    """A weight after quantization."""
    if weights == "int8":
        whole, scale = quantised(weight)
        return whole * scale[:, None]
    return weight.to(torch.bfloat16)
