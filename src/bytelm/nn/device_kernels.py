"""Fused operations besides matmuls on a GPU, forward and backward: `device_programs` as functions of tensors.

Imported where there is Triton only; `fused.kernels` says where that is.
"""

# Triton does not exist on a CPU, and has no types. torch declares `backward` with any number of gradients; each here
# takes those that it has.
# pyright: basic, reportMissingImports=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bytelm.nn import device_programs as programs

TILE = 2048  # numbers that a program works on at once
PROGRAMS = 512  # that share the lines of a norm's backward pass, on every device: the sums are the same on all


def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the current stream."""
    program[grid](*arguments, **constants)


def tiles(lines: int, width: int) -> tuple[int, dict[str, int]]:
    """How many programs cover `[lines, width]`, and the shape of their tiles: whole vectors, without waste."""
    divisor = width & -width  # the largest power of two in it: tiles of that many columns need no mask
    columns = min(divisor if divisor >= 32 else triton.next_power_of_2(width), 1024)
    tall, across = TILE // columns, triton.cdiv(width, columns)
    return triton.cdiv(lines, tall) * across, {"WIDTH": width, "LINES": tall, "COLUMNS": columns, "ACROSS": across}


def whole(lines: int, width: int) -> tuple[int, dict[str, int]]:
    """The same in tiles that hold whole lines."""
    columns = triton.next_power_of_2(width)
    tall = max(1, TILE // columns)
    warps = min(max(4, columns // 1024), 16)
    return triton.cdiv(lines, tall), {"WIDTH": width, "LINES": tall, "COLUMNS": columns, "num_warps": warps}


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
        x = x.contiguous()
        lines = x.numel() // x.shape[-1]
        y, factors = torch.empty_like(x, dtype=kind), x.new_empty(lines, dtype=torch.float32)
        count, shape = whole(lines, x.shape[-1])
        launch(programs.norm, (count,), x, weight, y, factors, lines, eps, **shape)
        ctx.save_for_backward(x, weight, factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factors = ctx.saved_tensors
        count, shape = whole(len(factors), x.shape[-1])
        count = min(count, PROGRAMS)
        d_x, d_weight = torch.empty_like(x), factors.new_empty(count, x.shape[-1])
        operands = (x, weight, factors, d_y.contiguous(), d_x, d_weight)
        launch(programs.norm_back, (count,), *operands, len(factors), **shape)
        return d_x, d_weight.sum(0).to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
    """x / rms(x) · weight over the last axis, rounded to `kind`."""
    return _Norm.apply(x, weight, eps, kind)


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        lines = y.numel() // y.shape[-1]
        count, shape = tiles(lines, y.shape[-1])
        launch(programs.swiglu, (count,), x, y, lines, **shape)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x, lines = torch.empty_like(x), d_y.numel() // d_y.shape[-1]
        count, shape = tiles(lines, d_y.shape[-1])
        launch(programs.swiglu_back, (count,), x, d_y.contiguous(), d_x, lines, **shape)
        return d_x


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of the two halves of the last axis."""
    return _SwiGLU.apply(gate_up)


# --- rotary positions -------------------------------------------------------------------------------------------------


def _turned(parts: Sequence[Tensor], cosines: Tensor, sines: Tensor, *, sign: float) -> Tensor:
    """`[rows, places, parts, heads, head_dim]`: the first two of them turned, the third as it is."""
    parts = [x if x.stride(3) == 1 else x.contiguous() for x in parts]
    rows, places, heads, dim = parts[0].shape
    cosines, sines = cosines.contiguous(), sines.contiguous()
    angles = [0 if size == 1 else step for size, step in zip(cosines.shape[:2], cosines.stride(), strict=False)]
    y = parts[0].new_empty(rows, places, len(parts), heads, dim)
    three = [*parts, *parts[:1] * (3 - len(parts))]
    steps = [step for x in three for step in x.stride()[:3]]
    count, shape = tiles(rows * places, heads * dim)
    operands = (*three, cosines, sines, y, rows * places, places, *steps, *angles)
    launch(programs.turn, (count, len(parts)), *operands, SIGN=sign, PARTS=len(parts), HEAD=dim, **shape)
    return y


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned([x], cosines, sines, sign=1.0)[:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return _turned([d_y], *ctx.saved_tensors, sign=-1.0)[:, :, 0], None, None


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Each pair of `[rows, new, heads, head_dim]` turned; the angles `[rows or 1, new or 1, 1, head_dim / 2]`."""
    return _Rotate.apply(x, cosines, sines)


class _RotateTwo(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cosines, sines)
        query, keys, values = qkv.unbind(2)
        return *_turned([query, keys], cosines, sines, sign=1.0).unbind(2), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(gradients, *ctx.saved_tensors, sign=-1.0), None, None


def rotate_two(qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned, and values, of `[rows, new, 3, heads, head_dim]`; angles as those of `rotate`."""
    return _RotateTwo.apply(qkv, cosines, sines)


# --- maxima of runs ---------------------------------------------------------------------------------------------------


def run_edges(segment: Tensor, runs: int) -> tuple[Tensor, ...]:
    """The first slot of each run and the slot behind its last `[runs + 1]`, both 0 where it has none."""
    edges, slots = torch.zeros(2, runs + 1, dtype=torch.int32, device=segment.device), len(segment)
    launch(programs.edges, (triton.cdiv(slots, 1024),), segment, *edges.unbind(), slots, BLOCK=1024)
    return edges.unbind()


class _RunMaxima(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segment: Tensor, runs: int) -> Tensor:
        values, segment = values.contiguous(), segment.contiguous()
        width = values.shape[1]
        first, last = run_edges(segment, runs)
        y, best = values.new_empty(runs, width), first.new_empty(runs, width)
        columns = min(triton.next_power_of_2(width), 512)
        operands = (values, first, last, y, best)
        launch(programs.maxima, (runs, triton.cdiv(width, columns)), *operands, WIDTH=width, COLUMNS=columns)
        ctx.save_for_backward(segment, best)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        segment, best = ctx.saved_tensors
        d_values = d_y.new_empty(len(segment), d_y.shape[1])
        count, shape = tiles(*d_values.shape)
        operands = (d_y.contiguous(), best, segment, d_values, len(segment), len(best))
        launch(programs.maxima_back, (count,), *operands, **shape)
        return d_values, None, None


def run_maxima(values: Tensor, segment: Tensor, runs: int) -> Tensor:
    """The maximum of each run of slots, 0 where it has none: `[runs, dim]` of `[slots, dim]`.

    The slots of a run stand together; those that belong to none have the number `runs`.
    """
    return _RunMaxima.apply(values, segment, runs)


# --- cross-attention --------------------------------------------------------------------------------------------------

# Not by `nn.runs`: that kernel keeps gradients of 128 queries for each run, and a patch has about five bytes.


class _Cross(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, segment: Tensor) -> Tensor:
        operands = [x.contiguous() for x in (query, keys, values)]
        parts, slots = (query, len(keys)) if query.ndim == 4 else (keys, len(query))
        runs, parts, heads, dim = parts.shape
        columns = triton.next_power_of_2(dim)
        shape = {"PARTS": parts, "HEADS": heads, "HEAD": dim, "COLUMNS": columns}
        ctx.of_runs = {**shape, "BLOCK": 8, "num_warps": max(1, columns // 64)}  # a patch has few bytes
        ctx.of_bytes = {**shape, "BLOCK": max(1, TILE // 2 // columns)}
        ctx.scale, segment = dim**-0.5, segment.contiguous()
        ends = run_edges(segment, runs)
        y, lse = torch.empty_like(operands[0]), query.new_empty(query.shape[:-1], dtype=torch.float32)
        if query.ndim == 4:
            of_run = (*operands, *ends, y, lse, ctx.scale)
            launch(programs.attend_run, (runs * parts, heads), *of_run, **ctx.of_runs)
        else:
            of_byte = (*operands, segment, y, lse, slots, ctx.scale)
            launch(programs.attend_parts, (triton.cdiv(slots, ctx.of_bytes["BLOCK"]), heads), *of_byte, **ctx.of_bytes)
        ctx.save_for_backward(*operands, segment, y, lse, *ends)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, segment, y, lse, *ends = ctx.saved_tensors
        d_y, runs, slots = d_y.contiguous(), len(ends[0]) - 1, len(segment)
        known = (query, keys, values, d_y, lse, (y.float() * d_y.float()).sum(-1))
        d_query, d_keys, d_values = (torch.empty_like(x) for x in (query, keys, values))
        asking, asked = (d_query, d_query), (d_keys, d_values)
        parts, bytes = (asking, asked) if query.ndim == 4 else (asked, asking)
        grid = (runs * ctx.of_runs["PARTS"], ctx.of_runs["HEADS"])
        more = (*ends, *parts, ctx.scale)
        launch(programs.slopes_of_parts, grid, *known, *more, ASKS=query.ndim == 4, **ctx.of_runs)
        grid = (triton.cdiv(slots, ctx.of_bytes["BLOCK"]), ctx.of_bytes["HEADS"])
        more = (segment, *bytes, slots, runs, ctx.scale)
        launch(programs.slopes_of_bytes, grid, *known, *more, ASKS=query.ndim == 3, **ctx.of_bytes)
        return d_query, d_keys, d_values, None


def cross(query: Tensor, keys: Tensor, values: Tensor, segment: Tensor) -> Tensor:
    """Attention between bytes `[bytes, heads, head_dim]` and the run each goes with `[runs, parts, heads, head_dim]`.

    See `fused.cross`: whichever the query is of, keys and values are of the other. Bytes of no run have the number
    `runs`, and attend to nothing.
    """
    return _Cross.apply(query, keys, values, segment)


# --- n-grams ----------------------------------------------------------------------------------------------------------


def hashes(
    ids: Tensor, starts: Tensor, recent: Tensor, rows: int, primes: Sequence[int], sizes: Sequence[int], **of: int
) -> Tensor:
    """See `NgramEmbedding.hashes`: `[batch, new, tables]` of ids `[batch, new]`; `of`: OFFSET, PAD and VOCAB."""
    ids, starts, recent = ids.contiguous(), starts.contiguous(), recent.contiguous()
    index = ids.new_empty(*ids.shape, len(primes) * len(sizes))
    operands = (ids, starts, recent, index, ids.numel(), ids.shape[1], recent.shape[1], rows)
    constants = {"PRIMES": tuple(primes), "SIZES": tuple(sizes), "LONGEST": max(sizes), "BLOCK": 256, **of}
    launch(programs.hashes, (triton.cdiv(ids.numel(), 256),), *operands, **constants)
    return index


def sum_rows(table: Tensor, index: Tensor) -> Tensor:
    """The sum of some rows of a table for each bag: `[bags, dim]` of an index `[bags, size]` (int64). No gradient."""
    table, index = table.detach().contiguous(), index.contiguous()
    y = table.new_empty(len(index), table.shape[1])
    count, shape = tiles(*y.shape)
    launch(programs.sum_rows, (count,), table, index, y, len(index), TABLES=index.shape[1], **shape)
    return y
