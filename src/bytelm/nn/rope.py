"""Rotary position embedding over interleaved pairs (RoFormer, eq. 34; Llama's and BLT's form)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bytelm.nn import fused
from bytelm.transfer import to_device, to_host

WITHOUT_FLOAT64 = "mps"  # devices of this type: angles are made on the host
Rotation = tuple[Tensor, Tensor]


def rotation(positions: Int[Tensor, "batch new"], head_dim: int, theta: float, turned: int | None = None) -> Rotation:
    """Cosines and sines, each `[batch, new, 1, head_dim / 2]`. Angles in float64: positions may run into millions.

    `turned`: how many of a head's numbers have positions, the first ones; None: all.
    """
    device = positions.device
    if device.type == WITHOUT_FLOAT64:
        positions = to_host(positions)
    width = head_dim if turned is None else turned
    frequencies = theta ** -(torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / max(1, width))
    if width < head_dim:
        frequencies = F.pad(frequencies, (0, (head_dim - width) // 2))
    angles = positions[..., None, None].double() * frequencies
    return to_device(angles.cos().float(), device), to_device(angles.sin().float(), device)


def rotate(x: Float[Tensor, "batch new heads head_dim"], by: Rotation) -> Float[Tensor, "batch new heads head_dim"]:
    """Turn each pair (x[2i], x[2i+1]) by its angle, in float32; the result has the dtype of `x`."""
    cos, sin = by
    if device := fused.kernels(x):
        return device.rotate(x, cos, sin)
    if fused.fits(x):
        return fused.rotate(x, cos, sin)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def rotate_two(qkv: Float[Tensor, "batch new 3 heads head_dim"], by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, turned, and values: each `[batch, new, heads, head_dim]`."""
    if device := fused.kernels(qkv):
        return device.rotate_two(qkv, *by)
    query, keys, values = qkv.unbind(2)
    return rotate(query, by), rotate(keys, by), values
