"""Weights in panels: the layout, and the numbers, against torch's."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.native import library
from bytelm.native.packing import PANEL, held, hold, packed, packed_bytes
from bytelm.native.weights import quantised

pytestmark = pytest.mark.skipif(library.library("kernels") is None, reason="there are no kernels")

SHAPES = [(64, 96), (70, 37), (2 * 33, 130), (2, 1)]


def in_panels(weight: Tensor, parts: int) -> Tensor:
    """`[parts · out, in]` as `[panels, in, rows]`, panels of the parts in turn, filled up with zeros."""
    whole = weight.unflatten(0, (parts, -1))
    whole = F.pad(whole, (0, 0, 0, -whole.shape[1] % PANEL))
    return whole.unflatten(1, (-1, PANEL)).permute(1, 0, 3, 2).flatten(0, 1)


def memory(address: int, like: Tensor) -> Tensor:
    """The memory of a matrix."""
    found = torch.empty_like(like)
    ctypes.memmove(found.data_ptr(), address, like.nbytes)
    return found


def weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    found = torch.from_numpy(np.random.default_rng(shape[0]).standard_normal(shape)).to(dtype)
    found[0] = 0  # of which no scale can be taken
    found[1, 0] = 2.5  # a tie where 127 is the largest
    return found


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [None, "bf16", "int8"])
def test_panels(dtype: torch.dtype, rounded: str | None, shape: tuple[int, int], halves: bool) -> None:
    if dtype == torch.float64 and rounded:
        pytest.skip("float64 is never rounded")
    given, parts = weight(shape, dtype), 2 if halves else 1
    found, scale = packed(given, rounded, halves=halves), None
    wanted = given if rounded is None else given.to(torch.bfloat16)
    if rounded == "int8":
        wanted, scale = quantised(given)
    torch.testing.assert_close(*(memory(found.data, x := in_panels(wanted, parts).contiguous()), x), rtol=0, atol=0)
    if scale is not None:
        scales = in_panels(scale[:, None], parts).flatten()
        torch.testing.assert_close(memory(found.scale, scales), scales, rtol=0, atol=0)
    assert packed_bytes(shape, wanted.dtype, halves=halves) == in_panels(wanted, parts).numel() * wanted.itemsize


@pytest.mark.parametrize("halves", [False, True])
def test_weights_that_were_rounded_before(halves: bool) -> None:
    """int8 stays what it is; as bf16 it is restored first."""
    whole, scale = quantised(weight((70, 37), torch.float32))
    same = packed(whole, "int8", scale=scale, halves=halves)
    panels = in_panels(whole, 2 if halves else 1).contiguous()
    torch.testing.assert_close(memory(same.data, panels), panels, rtol=0, atol=0)
    scales = in_panels(scale[:, None], 2 if halves else 1).flatten()
    torch.testing.assert_close(memory(same.scale, scales), scales, rtol=0, atol=0)
    other = packed(whole, "bf16", scale=scale, halves=halves)
    panels = in_panels((whole * scale[:, None]).to(torch.bfloat16), 2 if halves else 1).contiguous()
    torch.testing.assert_close(memory(other.data, panels), panels, rtol=0, atol=0)


def test_what_is_held_of_a_weight_lives_as_long_as_the_weight() -> None:
    bare = torch.empty(64, 96, device="meta")
    assert held(torch.empty(3)) is None
    matrix = packed(weight((64, 96), torch.float32))
    hold(bare, matrix)
    assert held(bare) is matrix
