"""Tensors and tables that several processes hold together, each some of the rows.

    process r of n holds rows [r · per, (r + 1) · per), per = ⌈rows / n⌉, as `Shard(0)` of torch's DTensor cuts

A DTensor says so of weights that FSDP2 gathers whole. Of n-gram tables nobody ever holds all: rows that were looked up
are exchanged, and their gradients go back to who holds them.

    index [bags, tables] → each row once → asked of its holder → its rows → the sum of each bag
    gradients of these rows → their holders, who add them in the order of the processes

A row travels once each way for every process that looked it up in a micro-batch, however often it did.
"""

# torch declares `backward` of any number of gradients; each here takes the one that it has.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from bytelm.nn.dtensor import is_dtensor
from bytelm.nn.rows import RowGradients


def rows_here(tensor: Tensor) -> tuple[int, Tensor]:
    """The first of the rows that this process holds of a tensor, and these rows; of a plain tensor all."""
    if is_dtensor(tensor):
        from torch.distributed.tensor import Shard

        held = tensor.to_local()
        for dimension, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                assert placement.dim == 0, "only rows are sharded here"
                per = -(-tensor.shape[0] // tensor.device_mesh.size(dimension))
                return min(tensor.device_mesh.get_local_rank(dimension) * per, tensor.shape[0]), held
        return 0, held
    return 0, tensor


def sharded_rows(held: Tensor, like: Tensor) -> Tensor:
    """What a process holds of a tensor that has its rows where `like` has them, as the whole.

    A DTensor is one already; what is plain stays so where `like` is, and a single number.
    """
    if is_dtensor(like) and not is_dtensor(held) and held.ndim:
        from torch.distributed.tensor import DTensor

        shape = torch.Size((like.shape[0], *held.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(held, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return held


def empty_rows(like: Tensor, mesh: DeviceMesh) -> Tensor:
    """Room for the rows of a tensor that this process holds, on the device of a mesh of one dimension; as the whole."""
    from torch.distributed.tensor import DTensor, Shard

    per = -(-len(like) // mesh.size())
    count = max(0, min(per, len(like) - mesh.get_local_rank() * per))
    held = torch.empty(count, *like.shape[1:], dtype=like.dtype, device=mesh.device_type)
    return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())


@dataclass
class Exchanged:
    """What was exchanged since it was last asked, by this process."""

    looked_up: int = 0
    """Different rows of each micro-batch, added up."""
    received: int = 0
    """Rows that came from other processes: values of rows looked up, and gradients of rows held."""


class ShardedRows:
    """The rows of a table `[rows, dim]` that this process holds, and the way to those of the others."""

    def __init__(self, table: Tensor) -> None:
        """`table`: a DTensor over a mesh of one dimension, which shares its memory with `held`."""
        assert is_dtensor(table)
        self.group = table.device_mesh.get_group()
        self.world = table.device_mesh.size()
        self.per = -(-len(table) // self.world)
        self.first, held = rows_here(table.detach())
        self.held = nn.Parameter(held)
        """What is trained: `[at most per, dim]`."""
        self.exchanged = Exchanged()

    def looked_up(
        self, index: Int[Tensor, "bags tables"], kept: RowGradients | None = None
    ) -> Float[Tensor, "bags dim"]:
        """The sum of each bag's rows; all processes have to ask at the same time.

        The gradient of the rows held here is sparse, or goes to `kept`, as that of a bag for each row.
        """
        wanted, inverse = index.unique(return_inverse=True)
        found = _Exchange.apply(self.held, wanted, self, kept)
        return F.embedding_bag(inverse, found, mode="sum")

    def sent(self, wanted: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " held"], list[int], list[int]]:
        """Rows of those held here that others, or this process, want; how many each wants, and is wanted of."""
        edges = torch.searchsorted(wanted, torch.arange(1, self.world + 1, device=wanted.device) * self.per)
        asking = torch.diff(edges, prepend=edges.new_zeros(1))
        asked = torch.empty_like(asking)
        dist.all_to_all_single(asked, asking, group=self.group)
        asking, asked = asking.tolist(), asked.tolist()
        index = wanted.new_empty(sum(asked))
        dist.all_to_all_single(index, wanted, asked, asking, group=self.group)
        return index - self.first, asked, asking

    def count(self, received: list[int], looked_up: int = 0) -> None:
        """Add rows received from each process to what was exchanged."""
        self.exchanged.looked_up += looked_up
        self.exchanged.received += sum(received) - received[dist.get_rank(self.group)]


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, wanted: Tensor, rows: ShardedRows, kept: RowGradients | None) -> Tensor:
        """The rows `wanted`, which are sorted, from whoever holds them."""
        index, asked, asking = rows.sent(wanted)
        found = held.new_empty(len(wanted), held.shape[1])
        dist.all_to_all_single(found, held[index], asking, asked, group=rows.group)
        rows.count(asking, len(wanted))
        ctx.save_for_backward(index)
        ctx.rows, ctx.kept, ctx.asked, ctx.asking, ctx.shape = rows, kept, asked, asking, held.shape
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows held here: of a row that several processes looked up, the sum."""
        (index,) = ctx.saved_tensors
        gradients = d_found.new_empty(len(index), d_found.shape[1])
        dist.all_to_all_single(gradients, d_found.contiguous(), ctx.asked, ctx.asking, group=ctx.rows.group)
        ctx.rows.count(ctx.asked)
        if ctx.kept is not None:
            ctx.kept.index.append(index[:, None])
            ctx.kept.gradients.append(gradients)
            return None, None, None, None
        some, inverse = index.unique(return_inverse=True)
        summed = gradients.new_zeros(len(some), gradients.shape[1]).index_add_(0, inverse, gradients)
        sparse = torch.sparse_coo_tensor(some[None], summed, ctx.shape, check_invariants=False, is_coalesced=True)
        return sparse, None, None, None
