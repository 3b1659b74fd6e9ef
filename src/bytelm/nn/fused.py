"""Fused kernels for everything but the matmuls, one pass over memory each, on a CPU and on a GPU.

Every function has the same definition in plain torch where it is called: norm.py, rope.py, transformer.py, pool.py,
embed.py, attention.py, cross.py. They ask here first, `fits` for a CPU and `kernels` for a GPU, and go their own way
where the answer is no: in float64, in bfloat16 on a CPU that does not multiply it, without a compiler.
"""

# torch declares `backward` of any number of gradients; each here takes the one that it has.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bytelm.native.training import (
    LINES,
    Attend,
    Crossed,
    Turn,
    avoids_mkl,
    call,
    functions,
    multiplies_bfloat16,
    strides,
)

VECTOR = 16  # numbers, of which widths are multiples on a CPU
MANY = 16  # lines, from which on a product is worth another library
KINDS = (torch.float32, torch.bfloat16, torch.int64)  # that a GPU's kernels read
_here = threading.local()


@functools.cache
def triton_kernels() -> ModuleType | None:
    """`device_kernels`; None without Triton, on a GPU that is older than bfloat16, or where Triton fails."""
    if find_spec("triton") is None or torch.cuda.get_device_capability() < (8, 0):
        return None
    from bytelm.nn import device_kernels

    try:
        device_kernels.swiglu(torch.ones(1, 2, device="cuda"))
    except Exception as error:  # whatever Triton, and the compilers that it calls, may raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        warnings.warn(
            f"Triton cannot compile for this GPU, using plain torch (slower): {told}", RuntimeWarning, stacklevel=2
        )
        return None
    return device_kernels


def kernels(x: Tensor) -> ModuleType | None:
    """`device_kernels` where `x` is on the GPU and of a kind that they work on; None elsewhere."""
    if x.device.type != "cuda" or x.dtype not in KINDS or x.numel() == 0 or torch.compiler.is_compiling():
        return None
    return triton_kernels() if x.device.index == torch.cuda.current_device() else None


def rounds(x: Tensor) -> bool:
    """Whether products are in bfloat16 at present where `x` is."""
    device = x.device.type
    if device == "meta":  # where nothing is computed, only counted
        return False
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16


def multiplied(x: Tensor) -> torch.dtype:
    """In which products of `x` are at present."""
    return torch.bfloat16 if rounds(x) else x.dtype


@contextmanager
def plain() -> Generator[None]:
    """Have a CPU compute as torch alone does: what was decided by its very bits is decided in the same way again."""
    before, _here.plain = getattr(_here, "plain", False), True
    try:
        yield
    finally:
        _here.plain = before


def ready(kind: torch.dtype) -> bool:
    """Whether a CPU's functions of numbers of this kind are faster here than torch."""
    if torch.compiler.is_compiling() or getattr(_here, "plain", False):
        return False
    return multiplies_bfloat16() if kind == torch.bfloat16 else kind == torch.float32 and functions() is not None


def fits(x: Tensor) -> bool:
    """Whether a tensor of this kind can be worked on by a CPU's."""
    return x.device.type == "cpu" and x.shape[-1] % VECTOR == 0 and x.numel() > 0 and ready(x.dtype)


def norm_fits(x: Tensor) -> bool:
    """Whether a norm of `x` by float32 weights can be, to float32 or, where products round it anyhow, to bfloat16."""
    known = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and rounds(x))
    return known and x.device.type == "cpu" and x.shape[-1] % VECTOR == 0 and x.numel() > 0 and ready(multiplied(x))


def attends(x: Tensor, head_dim: int) -> bool:
    """Whether a stack over `x` in heads of this width will find its attention here."""
    return norm_fits(x) and head_dim % VECTOR == 0


def wide(x: Tensor) -> int:
    """Whether kernels are to read `x` as float32, not as bfloat16."""
    return int(x.dtype == torch.float32)


def singles(*shape: int) -> Float[Tensor, "..."]:
    """Room for float32."""
    return torch.empty(shape, dtype=torch.float32)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x, dtype=multiplied(x))
        lines, dim = x.numel() // x.shape[-1], x.shape[-1]
        factor = singles(lines)
        call("bytelm_norm", x, wide(x), weight, lines, dim, eps, y, wide(y), factor)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        lines, dim = factor.numel(), x.shape[-1]
        d_x, d_weight = torch.empty_like(x), singles(-(-lines // LINES), dim)
        d_y = d_y.contiguous()
        call("bytelm_norm_back", x, wide(x), weight, factor, d_y, wide(d_y), lines, dim, d_x, d_weight)
        return d_x, d_weight.sum(0), None


def rms_norm(x: Float[Tensor, "... dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "... dim"]:
    """x / rms(x) · weight, rounded to bfloat16 where products are in it."""
    return _Norm.apply(x, weight, eps)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        call("bytelm_swiglu", x, wide(x), None, y.numel() // y.shape[-1], y.shape[-1], y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        call("bytelm_swiglu", x, wide(x), d_y.contiguous(), d_y.numel() // d_y.shape[-1], d_y.shape[-1], d_x)
        return d_x


def swiglu(gate_up: Float[Tensor, "... twice"]) -> Float[Tensor, "... hidden"]:
    """silu(gate) · up of the two halves of the last axis."""
    return _SwiGLU.apply(gate_up)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, sign: float) -> Tensor:
    rows, places, heads, dim = x.shape
    if x.stride(3) != 1 or x.stride(2) != dim:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    angle_row = 0 if len(cosines) == 1 else places * dim // 2
    shape = rows, places, heads, dim // 2, x.stride(0), x.stride(1)
    call("bytelm_turn", Turn(*shape, cosines.data_ptr(), sines.data_ptr(), angle_row), x, wide(x), sign, y)
    return y


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        cosines, sines = (angle.expand(-1, x.shape[1], -1, -1).contiguous() for angle in (cosines, sines))
        ctx.save_for_backward(cosines, sines)
        return _turned(x, cosines, sines, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        return _turned(d_y, cosines, sines, -1.0), None, None


def rotate(x: Float[Tensor, "rows new heads head_dim"], cosines: Tensor, sines: Tensor) -> Tensor:
    """Each pair turned by its angle; the angles `[rows or 1, new or 1, 1, head_dim / 2]`."""
    return _Rotate.apply(x, cosines, sines)


def _attend(query: Tensor, keys: Tensor, values: Tensor, first: Tensor, out: Tensor, lse: Tensor) -> Attend:
    rows, queries, heads, dim = query.shape
    return Attend(
        *(rows, heads, dim, queries, keys.shape[1]),
        *(x.data_ptr() for x in (query, keys, values)),
        *(strides(x) for x in (query, keys, values)),
        *(first.data_ptr(), 0 if len(first) == 1 else queries),
        *(out.data_ptr(), lse.data_ptr()),
    )


def _even(x: Tensor) -> Tensor:
    """The same as kernels can read it, two neighbours at a time in bfloat16."""
    return x if x.stride(3) == 1 and (wide(x) or not any(step % 2 for step in x.stride()[:3])) else x.contiguous()


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, first: Tensor) -> Tensor:
        query, keys, values = _even(query), _even(keys), _even(values)
        rows, queries, heads, _ = query.shape
        out, lse = torch.empty(query.shape, dtype=query.dtype), singles(rows, heads, queries)
        first = first.contiguous()
        call("bytelm_attend", _attend(query, keys, values, first, out, lse), wide(query), 0)
        ctx.save_for_backward(query, keys, values, first, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: what is recomputed may be asked for once
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in saved[:3]]
        d_out, shape = d_out.contiguous(), _attend(*saved)
        shape.d_out = d_out.data_ptr()
        shape.d_query, shape.d_keys, shape.d_values = (x.data_ptr() for x in gradients)
        call("bytelm_attend", shape, wide(d_out), 1)
        return (*gradients, None)


def attention(
    query: Float[Tensor, "rows queries heads head_dim"],
    keys: Float[Tensor, "rows slots #heads head_dim"],
    values: Float[Tensor, "rows slots #heads head_dim"],
    first: Int[Tensor, "rows_or_1 queries"],
) -> Float[Tensor, "rows queries heads head_dim"]:
    """Scaled dot-product attention in which query t sees the slots from `first` (int32) to slots - queries + t.

    Scores are never written out: memory is linear (Dao 2023, arXiv 2307.08691).
    """
    keys, values = (x.expand(-1, -1, query.shape[2], -1) for x in (keys, values))
    return _Attention.apply(query, keys, values, first)


def _crossed(query: Tensor, keys: Tensor, values: Tensor, patch: Tensor, weights: Tensor, out: Tensor) -> Crossed:
    of_patches = keys if keys.ndim == 4 else query
    tensors = (patch, query, keys, values, weights, out)
    return Crossed(len(patch), *of_patches.shape, *(x.data_ptr() for x in tensors))


class _Cross(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, patch: Tensor) -> Tensor:
        query, keys, values, patch = (x.contiguous() for x in (query, keys, values, patch))
        of_patches = keys if keys.ndim == 4 else query
        out, weights = torch.zeros_like(query), singles(len(patch), *of_patches.shape[1:3])
        call("bytelm_crossed", _crossed(query, keys, values, patch, weights, out), wide(query), int(query.ndim == 4), 0)
        ctx.save_for_backward(query, keys, values, patch, weights, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.zeros_like(x) for x in saved[:3]]
        d_out, shape = d_out.contiguous(), _crossed(*saved)
        shape.d_out = d_out.data_ptr()
        shape.d_query, shape.d_keys, shape.d_values = (x.data_ptr() for x in gradients)
        call("bytelm_crossed", shape, wide(d_out), int(saved[0].ndim == 4), 1)
        return (*gradients, None)


def cross(query: Tensor, keys: Tensor, values: Tensor, patch: Int[Tensor, " bytes"]) -> Tensor:
    """Attention between bytes `[bytes, heads, head_dim]` and the patch each goes with `[patches, k, heads, head_dim]`.

    Whichever of them the query is of, the keys and values are of the other. The bytes of a patch stand in one run;
    those that go with none have a number from `patches` on.
    """
    return _Cross.apply(query, keys, values, patch)


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        d_y = d_y.contiguous()
        return _onednn(d_y, weight.t()) if of_x else None, _onednn(d_y.t(), x.t()) if of_weight else None


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def _onednn_multiplies() -> bool:
    """Whether oneDNN, which torch has for bfloat16, is faster in float32 too: MKL uses AVX-512 on Intel's alone."""
    present = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return present and torch.backends.mkl.is_available() and avoids_mkl()


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is the faster one."""
    known = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.shape[-1] > 0
    return known and x.numel() >= MANY * x.shape[-1] and not rounds(x) and ready(x.dtype) and _onednn_multiplies()


def product(x: Float[Tensor, "... given"], weight: Float[Tensor, "found given"]) -> Float[Tensor, "... found"]:
    """x · weightᵀ in float32 by oneDNN."""
    return _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))


class _Bags(Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return F.embedding_bag(index, table, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        d_out = d_out.contiguous()
        ordered, order = index.flatten().sort(stable=True)
        rows, counts = ordered.unique_consecutive(return_counts=True)
        gradients = singles(len(rows), d_out.shape[1])
        reader, ends = order // index.shape[1], counts.cumsum(0)
        call("bytelm_gather_rows", d_out, reader, ends, len(rows), d_out.shape[1], gradients)
        sparse = torch.sparse_coo_tensor(rows[None], gradients, ctx.shape, check_invariants=False, is_coalesced=True)
        return sparse, None


def bags_fit(table: Tensor) -> bool:
    """Whether `bags` can read such a table."""
    known = table.dtype == torch.float32 and table.device.type == "cpu" and table.shape[-1] % VECTOR == 0
    return known and not torch.compiler.is_compiling() and functions() is not None


def bags(table: Float[Tensor, "rows dim"], index: Int[Tensor, "bags size"]) -> Float[Tensor, "bags dim"]:
    """The sum of some rows for each bag; the table's gradient is sparse, each row in it once."""
    return _Bags.apply(table, index)
