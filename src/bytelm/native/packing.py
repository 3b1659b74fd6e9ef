"""Weights as the kernels read them: in panels, rounded where that is asked for, kept as long as the weight lives.

A weight of a model that was loaded for inference has no memory of its own (it is on the meta device): there is only
what is held here for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bytelm.native.library import library
from bytelm.native.weights import checksum

F64, F32, BF16, I8 = range(4)
KINDS = {torch.float64: F64, torch.float32: F32, torch.bfloat16: BF16, torch.int8: I8}
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
SIZES = (8, 4, 2, 1)  # bytes of a number of each kind
PANEL = 32  # rows of a matrix that are stored together


class Matrix(ctypes.Structure):
    """A weight, and references that keep its memory alive; see matrix.h."""

    _fields_ = (
        *(("data", c_void_p), ("scale", c_void_p)),
        *((name, c_int64) for name in ("out", "in_", "kind", "streamed")),
    )
    held: tuple[Any, ...]
    rows: int
    bad: int
    """How many of its numbers are not finite, of a packed one."""

    @property
    def bytes(self) -> int:
        """Memory traffic in bytes of a product with it, without what fills up its last panel."""
        return int(self.rows * self.in_ * SIZES[self.kind] + (4 * self.rows if self.scale else 0))


class Packing(ctypes.Structure):
    """See pack.h."""

    _fields_ = (
        *(("from_", c_void_p), ("from_scale", c_void_p)),
        *((name, c_int64) for name in ("from_kind", "rows", "in_", "parts")),
        *(("to", c_void_p), ("to_scale", c_void_p), ("to_kind", c_int64)),
    )


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Packed copies of each weight, by quantization, with its checksum: weights may be changed in place."""
_held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What there is of a weight without memory of its own."""


def hold(weight: Tensor, matrix: Matrix) -> None:
    """Keep a matrix as all that there is of a weight on the meta device."""
    _held[weight] = matrix


def held(weight: Tensor) -> Matrix | None:
    """What is held of a weight on the meta device; None for a weight with memory of its own."""
    return _held[weight] if weight.is_meta else None


def cached(weight: Tensor, rounded: str | None, halves: bool, streamed: bool) -> Matrix:
    """A packed copy of a weight with memory of its own, made again where the weight was changed."""
    kept: dict[Any, tuple[bytes, Matrix]] | None = _packed.get(weight)
    if kept is None:
        kept = _packed[weight] = {}
    key, content = (rounded, halves, streamed), checksum(weight)
    if key not in kept or kept[key][0] != content:
        kept[key] = content, packed(weight.detach(), rounded, halves=halves, streamed=streamed)
    return kept[key][1]


def packed(
    weight: Tensor,
    rounded: str | None = None,
    *,
    scale: Tensor | None = None,
    halves: bool = False,
    streamed: bool = False,
    out: Tensor | None = None,
) -> Matrix:
    """A weight `[out, in]` in the layout of matrix.h, rounded to "bf16", "int8", or (None) in its own precision.

    `scale` [out]: that of each row of a weight in int8. `halves`: two layers one above the other, whose panels are to
    lie in turn. `streamed`: whether the model's weights exceed the processor's caches. `out`: the memory that it is to
    lie in, `packed_bytes` of uint8.
    """
    shape, parts, own = weight.shape, 2 if halves else 1, scale
    kind = DTYPES.get(rounded or "", weight.dtype)
    if out is None:
        out = torch.empty(packed_bytes(shape, kind, halves=halves), dtype=torch.uint8)
    found = out.view(kind).view(-1, shape[1], PANEL)
    scale = torch.empty(len(found) * PANEL) if kind == torch.int8 else None
    weight, own = weight.contiguous(), None if own is None else own.contiguous()
    kinds, rows = (KINDS[weight.dtype], KINDS[kind]), shape[0] // parts
    source = (weight.data_ptr(), _at(own), kinds[0], rows, shape[1], parts)
    packing = Packing(*source, found.data_ptr(), _at(scale), kinds[1])
    functions = library("kernels")
    assert functions is not None  # `Kernels.open`
    functions.bytelm_pack.restype = c_int64
    bad = functions.bytelm_pack(byref(packing), c_int64(torch.get_num_threads()))
    matrix = _matrix(found, (shape[0] if parts == 1 else len(found) * PANEL, shape[1]), scale, streamed)
    matrix.rows, matrix.bad = shape[0], bad
    return matrix


def table(weight: Tensor, scale: Tensor | None = None) -> Matrix:
    """A contiguous weight that rows are taken from, as it is; `scale`: that of each row of one in int8."""
    return _matrix(weight, weight.shape, scale)


def packed_bytes(shape: Sequence[int], kind: torch.dtype, *, halves: bool = False) -> int:
    """Bytes of a weight `[out, in]` in panels, without scales."""
    parts = 2 if halves else 1
    return parts * -(-shape[0] // parts // PANEL) * PANEL * shape[1] * kind.itemsize


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _matrix(weight: Tensor, shape: Sequence[int], scale: Tensor | None, streamed: bool = False) -> Matrix:
    found = Matrix(weight.data_ptr(), _at(scale), *shape, KINDS[weight.dtype], streamed)
    found.held, found.rows = (weight, scale), shape[0]
    return found
