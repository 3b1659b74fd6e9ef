"""Row-wise updates of tables in Triton: gradients summed, rows updated, in one pass each.

    rows    3 3 3 7 9 9 ...     in order, as sorting gave them
    order   b b b b b b ...     the bag that read each

One program is one place of `rows`. Where the row before is the same it has nothing to do; the first of a row sums the
gradients of all its bags, in the same order always. Everything else is as `nn.rows` defines it, without a buffer.

Imported where there is Triton only.
"""

# Triton has no types of its own, its functions are Python in name only, and it is not there on a CPU.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

BAGS = 8  # whose gradients are read at once; most rows have one, those of frequent n-grams thousands

# Triton recompiles for whole numbers that are 1, or multiples of 16; counts change from step to step.
kernel = triton.jit(do_not_specialize=["places"])


@kernel
@no_type_check
def _first(rows, place):
    """The row of a place, and whether it is the first of its kind."""
    row = tl.load(rows + place)
    before = tl.load(rows + place - 1, mask=place > 0, other=-1)
    return row, row != before


@kernel
@no_type_check
def _sum(rows, order, gradients, place, row, places, DIM: tl.constexpr, COLUMNS: tl.constexpr, BAGS: tl.constexpr):
    """The gradients of all bags that read a row, whose first place this is."""
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((BAGS, COLUMNS), tl.float32)
    more = True
    while more:
        here = place + tl.arange(0, BAGS)
        own = tl.load(rows + here, mask=here < places, other=-1) == row
        bag = tl.load(order + here, mask=own, other=0)
        total += tl.load(gradients + bag[:, None] * DIM + column, mask=own[:, None] & (column < DIM), other=0.0)
        place += BAGS
        more = tl.sum(own.to(tl.int32)) == BAGS
    return tl.sum(total, 0)


@kernel
@no_type_check
def _squares(rows, order, gradients, out, places, DIM: tl.constexpr, COLUMNS: tl.constexpr, BAGS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row, first = _first(rows, place)
    found = 0.0
    if first:
        gradient = _sum(rows, order, gradients, place, row, places, DIM, COLUMNS, BAGS)
        found = tl.sum(gradient * gradient)
    tl.store(out + place, found)


@kernel
@no_type_check
def _move(
    rows, order, gradients, table, second, places, rate, beta2, rest, eps,
    ROWWISE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, BAGS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, first = _first(rows, place)
    if first:
        gradient = _sum(rows, order, gradients, place, row, places, DIM, COLUMNS, BAGS)
        column = tl.arange(0, COLUMNS)
        at, there = row * DIM + column, column < DIM
        if ROWWISE:
            square = beta2 * tl.load(second + row) + rest * (tl.sum(gradient * gradient) / DIM)
            tl.store(second + row, square)
        else:
            square = beta2 * tl.load(second + at, mask=there, other=0.0) + rest * gradient * gradient
            tl.store(second + at, square, mask=there)
        own = tl.load(table + at, mask=there, other=0.0)
        tl.store(table + at, own - rate * gradient / (tl.sqrt(square) + eps), mask=there)


def _shape(gradients: Tensor) -> dict[str, int]:
    dim = gradients.shape[1]
    columns = triton.next_power_of_2(dim)
    return {"DIM": dim, "COLUMNS": columns, "BAGS": BAGS, "num_warps": 4 if columns <= 512 else 8}


def norm(rows: Tensor, order: Tensor, gradients: Tensor) -> Tensor:
    """The norm of the gradients of all rows. `rows`, `order`: `[places]`; `gradients`: `[bags, dim]`, float32."""
    squares = torch.empty(len(rows), device=gradients.device)
    _squares[(len(rows),)](rows, order, gradients, squares, len(rows), **_shape(gradients))
    return squares.sum().sqrt()


def move(
    rows: Tensor, order: Tensor, gradients: Tensor, table: Tensor, second: Tensor, rate: float, beta2: float, eps: float
) -> None:
    """Apply the update in place to the rows of `table` `[rows, dim]` and of its second moment, see `rows.adam_rows`."""
    numbers = len(rows), rate, beta2, 1 - beta2, eps  # in float32 the kernel would find another rest
    rowwise = second.shape[1] != gradients.shape[1]
    _move[(len(rows),)](rows, order, gradients, table, second, *numbers, ROWWISE=rowwise, **_shape(gradients))
