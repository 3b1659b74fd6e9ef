"""Sums of a table's rows, and their gradients, on devices: no shape here depends on device values.

A bag sums a row of each of several tables, which are concatenated to one:

    index      [bags, tables]   the row that each bag reads of each table
    gradients  [bags, dim]      of each bag, and so of each row that it read

The gradient of a row is the sum of those of the bags that read it. How many rows were read, only the device knows. So
autograd gives no gradient of the table: gradients are kept per bag, and the row update adds them up.
"""

# torch declares `backward` of any number of gradients; each here takes the one that it has.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bytelm.nn import fused
from bytelm.transfer import to_device, to_host

WIDEST = 2048  # numbers of a row that a kernel holds


def sum_rows(table: Float[Tensor, "rows dim"], index: Int[Tensor, "bags tables"]) -> Float[Tensor, "bags dim"]:
    """The sum of each bag's rows, for no gradient."""
    if device := fused.kernels(table):
        return device.sum_rows(table, index)
    return F.embedding_bag(index, table, mode="sum")


class _Bags(Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, kept: RowGradients) -> Tensor:
        ctx.save_for_backward(index)
        ctx.kept = kept
        return sum_rows(table, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, ...]:
        ctx.kept.index.append(ctx.saved_tensors[0])
        ctx.kept.gradients.append(d_out.contiguous())
        return None, None, None


def bags(
    table: Float[Tensor, "rows dim"], index: Int[Tensor, "bags tables"], kept: RowGradients
) -> Float[Tensor, "bags dim"]:
    """The sum of each bag's rows. Its gradients go to `kept`: the table has no gradient of its own."""
    return _Bags.apply(table, index, kept)


class _Sent(Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, device: torch.device) -> Tensor:
        return to_device(sums, device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return to_host(d_out), None


def sent(sums: Float[Tensor, "bags dim"], device: torch.device) -> Float[Tensor, "bags dim"]:
    """Sums of rows of a table on the host, for a model on a device; unchanged where that is one place.

    One copy from pinned memory without a wait; the gradient comes back in one, which waits for the device.
    """
    return sums if sums.device.type == device.type else _Sent.apply(sums, device)


def adam_rows(
    table: Float[Tensor, "rows dim"],
    second: Float[Tensor, "rows width"],
    index: Int[Tensor, " some"],
    gradient: Float[Tensor, "some dim"],
    rate: float,
    beta2: float,
    eps: float,
) -> None:
    """Move some rows as Adam does without momentum; `index` may name a row again, with the same gradient.

    second = beta2 · second + (1 - beta2) · gradient²; row -= rate · gradient / (√second + eps). Where `second` has one
    number for each row, gradient² is the mean over the row (row-wise Adam, as in FBGEMM).
    """
    square = second[index].mul_(beta2)
    if second.shape[1] == gradient.shape[1]:
        square.addcmul_(gradient, gradient, value=1 - beta2)
    else:
        square.add_(gradient.square().mean(1, keepdim=True), alpha=1 - beta2)
    second.index_copy_(0, index, square)
    table.index_copy_(0, index, table[index].addcdiv_(gradient, square.sqrt_().add_(eps), value=-rate))


def numbered(index: Int[Tensor, "bags tables"]) -> Int[Tensor, "tables bags"]:
    """The number, from 0 on, of the row that each bag read of a table, among all that were read of that table."""
    ordered, order = index.T.contiguous().sort(stable=True)
    number = F.pad(ordered.diff() != 0, (1, 0)).cumsum(1)
    return torch.empty_like(order).scatter_(1, order, number)


def summed(gradients: list[Float[Tensor, "some dim"]], number: Int[Tensor, " bags"]) -> Float[Tensor, "bags dim"]:
    """The gradient of each row that was read of a table, by its number; behind the last there are zeros.

    Equal rows are always added in the same order, as `index_add_` on a GPU is not: processes that share a training
    would go down different gradients.
    """
    add, count = torch.ops.aten.embedding_dense_backward, len(number)
    parts = number.split([len(part) for part in gradients])
    found = (add(part, of, count, -1, False) for part, of in zip(gradients, parts, strict=True))
    return functools.reduce(Tensor.add_, found)


@dataclass
class RowGradients:
    """The gradients of a table since they were last forgotten: of all bags, in the order in which they came."""

    index: list[Int[Tensor, "bags tables"]] = field(default_factory=list)
    gradients: list[Float[Tensor, "bags dim"]] = field(default_factory=list)
    order: tuple[Tensor, Tensor] | None = None
    """How rows and bags go together, which `norm` finds out."""

    def forget(self) -> None:
        """Reset."""
        self.index, self.gradients, self.order = [], [], None

    @torch.no_grad()
    def norm(self) -> Float[Tensor, ""]:
        """That of the gradients of all rows."""
        index = torch.cat(self.index)
        if fits(self.gradients[0]):
            from bytelm.nn import row_kernels

            rows, order = index.T.contiguous().sort(stable=True)  # tables have no rows in common: one line of all
            places = self.order = rows.flatten(), order.flatten()
            self.gradients = [torch.cat(self.gradients)] if len(self.gradients) > 1 else self.gradients
            return row_kernels.norm(*places, self.gradients[0])
        numbers = numbered(index)
        self.order = index, numbers
        return torch.stack([torch.linalg.vector_norm(summed(self.gradients, number)) for number in numbers]).norm()

    @torch.no_grad()
    def move(self, table: Tensor, second: Tensor, rate: float, beta2: float, eps: float) -> None:
        """Move the rows that were read, whose `norm` was asked for, as `adam_rows` does.

        Every bag of a row computes the same new values of the row, and writes them.
        """
        assert self.order is not None
        if fits(self.gradients[0]):
            from bytelm.nn import row_kernels

            row_kernels.move(*self.order, self.gradients[0], table, second, rate, beta2, eps)
            return
        index, numbers = self.order
        for rows, number in zip(index.T, numbers, strict=True):
            adam_rows(table, second, rows, summed(self.gradients, number)[number], rate, beta2, eps)


def fits(gradients: Tensor) -> bool:
    """Whether there is a kernel for such gradients."""
    return gradients.dtype == torch.float32 and gradients.shape[1] <= WIDEST and fused.kernels(gradients) is not None
