"""Rows of ids, and everything that follows from patch boundaries, derived once, on the host (`bytelm.transfer`).

ids         BOS  T   h   e  ' '  c   a   t      one row; PAD stands for positions that do not exist
opens        1   0   0   0   1   0   0   0      "the NEXT byte opens a patch", one decision after each byte
patch        0 | 1   1   1   1 | 2   2   2      the patch each byte lies in; patch 2 is still open
closed       1   1   1   1   2   2   2   2      how many patches are whole once this byte is read
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bytelm.transfer import to_device, to_host
from bytelm.units import BOS, EOS, PAD


@dataclass(frozen=True)
class Rows:
    """New ids of a batch with each row's real ids moved to the front, so that slot t is the t-th new id of its row."""

    ids: Int[Tensor, "batch new"]
    real: Bool[Tensor, "batch new"]
    lengths: Int[Tensor, " batch"]
    order: Int[Tensor, "batch new"] | None
    """Where each slot came from; None if nothing had to move."""

    @classmethod
    def of(cls, ids: Int[Tensor, "batch new"]) -> Rows:
        """Rows of ids that may hold PADs anywhere. Ids on a device are fetched, which waits for it."""
        ids = to_host(ids)
        real = ids != PAD
        lengths = real.sum(1)
        slots = torch.arange(ids.shape[1])
        packed = slots < lengths[:, None]
        if torch.equal(real, packed):
            return cls(ids, real, lengths, None)
        order = torch.sort(~real, dim=1, stable=True).indices
        return cls(ids.gather(1, order), packed, lengths, order)

    def align(self, values: Bool[Tensor, "batch new"]) -> Bool[Tensor, "batch new"]:
        """Values given in the caller's layout, in this one."""
        values = to_host(values)
        return values if self.order is None else values.gather(1, self.order)

    def restore(self, values: Tensor) -> Tensor:
        """Values `[batch, new, ...]` of this layout, in the caller's."""
        if self.order is None:
            return values
        order = to_device(self.order, values)
        index = order.reshape(order.shape + (1,) * (values.ndim - 2)).expand_as(values)
        return torch.empty_like(values).scatter(1, index, values)

    def starts(self, position: Int[Tensor, " batch"]) -> Bool[Tensor, "batch new"]:
        """Where a document starts: at a BOS, and at the very first id of a row that has read nothing (position 0)."""
        starts = self.ids == BOS
        if starts.shape[1]:
            starts[:, 0] |= (position == 0) & self.real[:, 0]
        return starts


def forced_openings(ids: Int[Tensor, "batch new"], starts: Bool[Tensor, "batch new"]) -> Bool[Tensor, "batch new"]:
    """Openings that hold under every scheme: the first id of a document is a patch by itself, and EOS ends one.

    So the first byte of a document is already predicted from a whole patch (the BOS), as in the BLT paper.
    """
    return starts | (ids == EOS)


def since(marks: Bool[Tensor, "batch new"], carry: Int[Tensor, " batch"]) -> Int[Tensor, "batch new"]:
    """How many slots ago the last mark was (0 at a mark). `carry` is that figure for the slot before the first."""
    slots = torch.arange(marks.shape[1])
    last = torch.where(marks, slots, -1).cummax(1).values
    return torch.where(last >= 0, slots - last, slots + 1 + carry[:, None])


def fronted(marks: Bool[Tensor, "batch new"]) -> tuple[Int[Tensor, "batch most"], Int[Tensor, " batch"]]:
    """The slots that are marked, moved to the front, and how many of them each row has; the rest is slot 0."""
    counts = marks.sum(1)
    most = int(counts.max())
    slots = torch.zeros(len(marks), most + 1, dtype=torch.long)
    index = torch.where(marks, marks.long().cumsum(1) - 1, most)
    arange = torch.arange(marks.shape[1]).expand_as(index)
    return slots.scatter(1, index, arange)[:, :most], counts


def at_end(values: Tensor, lengths: Int[Tensor, " batch"], before: Tensor) -> Tensor:
    """Each row's value `[batch, ...]` at its last real slot; rows without a new id keep the value from before."""
    if not values.shape[1]:
        return before
    lengths = to_device(lengths, values)
    rows = torch.arange(len(lengths), device=lengths.device)
    last = values[rows, (lengths - 1).clamp(min=0)]
    return torch.where((lengths > 0).reshape((-1,) + (1,) * (last.ndim - 1)), last, before)


def tail(values: Tensor, ends: Int[Tensor, " batch"], size: int) -> Tensor:
    """The `size` slots before slot `ends` of each row: the last on the right: `[batch, size, ...]`.

    Slots before the first repeat it: by the counts they do not exist.
    """
    ends = to_device(ends, values)
    index = (ends[:, None] - size + torch.arange(size, device=ends.device)).clamp(min=0)
    rows = torch.arange(len(ends), device=ends.device)[:, None]
    return values[rows, index]


@dataclass(frozen=True)
class Layout:
    """Which bytes make up the patches that close among the new bytes. `held` bytes were read before, their patch open.

    Slots are the held bytes, aligned on the right, then the new ones.
    """

    counts: Int[Tensor, " batch"]
    """Patches that close in each row."""
    patches: int
    """The largest of them: the width of the patch axis."""
    segment: Int[Tensor, "batch slots"]
    """row · patches + patch for a byte of a patch that closes; batch · patches for every other slot."""
    closed: Int[Tensor, "batch new"]
    """Patches closed in this row once this byte is read, itself included: 0 means none since the call began."""
    first: Bool[Tensor, "batch patches"]
    """Whether the patch opens a document."""
    held: Int[Tensor, " batch"]
    """Bytes of the patch that is open at the end."""

    @classmethod
    def of(
        cls,
        opens: Bool[Tensor, "batch new"],
        starts: Bool[Tensor, "batch new"],
        rows: Rows,
        held: Int[Tensor, " batch"],
        slots_held: int,
    ) -> Layout:
        """Derive everything from the decisions `opens`, document `starts`, and what was held before."""
        batch = len(held)
        closed = opens.long().cumsum(1)
        counts = at_end(closed, rows.lengths, torch.zeros_like(held))
        patches = int(counts.max()) if batch else 0
        # Patch and document of every slot; what was held belongs to patch 0 and to the document before the first start.
        before = closed.new_zeros(batch, slots_held)
        patch = torch.cat([before, closed - opens.long()], 1)
        document = torch.cat([before, starts.long().cumsum(1)], 1)
        arange = torch.arange(slots_held)
        real = torch.cat([arange >= slots_held - held[:, None], rows.real], 1)
        whole = real & (patch < counts[:, None])
        row = torch.arange(batch)[:, None]
        segment = torch.where(whole, row * patches + patch, batch * patches)
        # A document that starts while a patch is open drops that patch's bytes: no later byte can depend on them.
        newest = document.new_zeros(batch * patches + 1)
        newest = newest.scatter_reduce(0, segment.flatten(), document.flatten(), "amax")
        segment = torch.where(document == newest[segment], segment, batch * patches)
        first = torch.zeros(batch * patches + 1, dtype=torch.bool)
        first[segment[:, slots_held:][starts]] = True
        ago = since(opens, held)
        return cls(counts, patches, segment, closed, first[:-1].view(batch, patches), at_end(ago, rows.lengths, held))
