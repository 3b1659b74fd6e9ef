"""Attention within fixed-size patches, on a grid of new positions (MEGABYTE, 2.2 and 2.3.2).

    patch before      own patch
    . . b b           n n q .            reach 2, size 4: q sees b b n n q

Patches are independent except for `reach`, the last keys and values of the patch before ("cross-patch
attention"). So the cost is positions × (size + reach), and many patches are one batch:

    positions of a row      2 3 | 0 1 2 3 | 0          places in their patches; two were read before
    grid                    . . 2 3                    one line per patch; "." is an unused cell
                            0 1 2 3
                            0 . . .

A call within a single patch has one short line instead, from its first place on: a decode step is one cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from bytelm.nn import fused
from bytelm.nn.attention import Cache, Mask, mix
from bytelm.nn.rope import Rotation, rotate, rotation
from bytelm.transfer import to_device


@dataclass(frozen=True)
class Grid:
    """The cell of each new position in `[batch, patches, width]`, and the progress of each row's patches."""

    size: int
    """Positions in a patch."""
    patches: int
    """Patches touched by the call, at most, over rows."""
    width: int
    """Places of a line: `size`, or fewer within a single patch."""
    cell: Int[Tensor, "batch new"]
    """The cell of each position, from line 0 on; the number of cells for padding."""
    begin: Int[Tensor, " batch"]
    """The place of line 0's first cell."""
    fresh: Bool[Tensor, " batch"]
    """Whether the row's first new position starts a patch."""
    filled: Int[Tensor, " batch"]
    """Places of line 0 read before this call; `size` in a row without a new position."""
    last: Int[Tensor, " batch"]
    """The row's last line."""
    linked: Bool[Tensor, "batch patches"]
    """Whether the patch follows another of its document."""

    @classmethod
    def of(
        cls,
        place: Int[Tensor, "batch new"],
        linked: Bool[Tensor, "batch new"],
        lengths: Int[Tensor, " batch"],
        size: int,
    ) -> Grid:
        """Derive the grid from places in patches; the first `lengths` of each row are real."""
        batch, new = place.shape
        real = torch.arange(new, device=place.device) < lengths[:, None]
        opens = (place == 0) & real
        fresh = opens[:, 0]
        line = opens.long().cumsum(1) - fresh.long()[:, None]
        last = line[:, -1]  # padding starts no patch
        patches = int(last.max()) + 1
        width = size if patches > 1 else max(1, int(lengths.max()))
        filled = torch.where(lengths > 0, place[:, 0], size)
        begin = torch.zeros_like(filled) if patches > 1 else filled
        outside = patches * width
        cell = torch.where(real, line * width + place - begin[:, None], outside)
        follows = linked.new_zeros(batch, patches + 1).scatter(1, torch.where(real, line, patches), linked)
        return cls(size, patches, width, cell, begin, fresh, filled, last, follows[:, :patches])

    def carried(self, device: torch.device) -> Grid:
        """Copy to a device."""
        if device.type == "cpu":
            return self
        names = ("cell", "begin", "fresh", "filled", "last", "linked")
        grid = dataclasses.replace(self, **{name: to_device(getattr(self, name), device) for name in names})
        grid.__dict__["plain"] = self.plain
        return grid

    @cached_property
    def plain(self) -> bool:
        """Whether the new slots are the first cells, in order: then nothing is moved."""
        cells = torch.arange(self.patches * self.width, device=self.cell.device)
        new = self.cell.shape[1]
        return new <= len(cells) and torch.equal(self.cell, cells[:new].expand_as(self.cell))

    def spread(self, values: Shaped[Tensor, "batch new ..."], empty: int) -> Shaped[Tensor, "batch patches width ..."]:
        """Values of positions, in their cells; the others are `empty`."""
        if self.plain:
            spare = self.patches * self.width - values.shape[1]
            cells = F.pad(values, (0, 0) * (values.ndim - 2) + (0, spare), value=empty)
            return cells.unflatten(1, (self.patches, self.width))
        shape = (values.shape[0], self.patches * self.width + 1, *values.shape[2:])
        cell = to_device(self.cell, values)
        index = cell.reshape(cell.shape + (1,) * (values.ndim - 2)).expand_as(values)
        cells = torch.full(shape, empty, dtype=values.dtype, device=values.device).scatter(1, index, values)
        return cells[:, :-1].unflatten(1, (self.patches, self.width))

    def collect(self, cells: Shaped[Tensor, "batch cells ..."]) -> Shaped[Tensor, "batch new ..."]:
        """The values in the cells of positions; undefined at slots without one."""
        if self.plain:
            return cells[:, : self.cell.shape[1]]
        index = to_device(self.cell, cells).clamp(max=cells.shape[1] - 1)
        return cells[torch.arange(len(cells), device=cells.device)[:, None], index]

    def lines(self, first: int, stop: int) -> Grid:
        """The grid of some lines, as a call after one with the lines before."""
        if (first, stop) == (0, self.patches):
            return self
        among = (self.last >= first) if first else torch.ones_like(self.fresh)
        return Grid(
            size=self.size,
            patches=stop - first,
            width=self.width,
            cell=self.cell - first * self.width,
            begin=torch.zeros_like(self.begin),
            fresh=among if first else self.fresh,
            filled=torch.where(among, 0, self.size) if first else self.filled,
            last=(self.last - first).clamp(0, stop - first - 1),
            linked=self.linked[:, first:stop],
        )


@dataclass(frozen=True)
class PatchView:
    """The `nn.attention.AttentionPattern` of a grid, whose lines are the rows of a call.

    A cache has `reach` + `size` slots: the end of the patch before, then the present patch by place. Keys of the patch
    before are rotated by its distance, so that angles depend on places only, and all patches share them.
    """

    grid: Grid
    reach: int
    mask: Mask
    first: Int[Tensor, "lines_or_1 width"] | None
    """The first visible slot of each cell (int32), of those up to its own; None for lines in place in a cache."""
    rotation: Rotation
    turn: Rotation
    """Maps a place in a patch to its place relative to the next patch."""

    @classmethod
    def of(cls, grid: Grid, reach: int, cached: bool, head_dim: int, theta: float) -> PatchView:
        """Derive the pattern of a call with a cache or without."""
        size, device = grid.size, grid.filled.device
        slots = torch.arange(size, device=device)
        # Lines that start at place 0 share one row of angles.
        places = slots[None] if grid.patches > 1 else grid.begin[:, None] + torch.arange(grid.width, device=device)
        angles = rotation(places, head_dim, theta)
        turn = rotation(torch.full((1, 1), -size, device=device), head_dim, theta)
        first = None if grid.patches == 1 and cached else slots.new_zeros(1, grid.width, dtype=torch.int32)
        if first is not None and grid.patches > 1 and reach:
            first = torch.where(grid.linked.flatten()[:, None], first, reach)
        seen = None
        if grid.patches == 1 and cached:
            seen = slots <= places[..., None]  # [batch, width, size]
        elif grid.patches > 1 and reach:
            seen = slots <= slots[:, None]
        if seen is not None and reach:
            before = grid.linked.flatten()[:, None, None].expand(-1, grid.width, reach)
            seen = torch.cat([before, seen.expand(len(before), -1, -1)], 2)
        seen = None if seen is None else seen.reshape(-1, 1, *seen.shape[-2:])
        return cls(grid, reach, Mask(seen, grid.width, device), first, angles, turn)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        """See `AttentionPattern`."""
        keys = self.slots(keys, cache.keys if cache else None, self.turned)
        values = self.slots(values, cache.values if cache else None, lambda x: x)
        if self.first is not None and fused.fits(query):
            mixed = fused.attention(query, keys, values, self.first)
        else:
            mixed = mix(query, keys, values, self.mask)
        return mixed, None if cache is None else Cache(self.newest(keys), self.newest(values))

    def turned(self, keys: Tensor) -> Tensor:
        """Keys `[batch, reach, ...]` of a patch as the next patch sees them."""
        return rotate(keys, self.turn)

    def slots(self, new: Tensor, cached: Tensor | None, turned: Callable[[Tensor], Tensor]) -> Tensor:
        """The slots of each line: the end of the patch before, then its own patch."""
        grid, reach = self.grid, self.reach
        own = new.unflatten(0, (-1, grid.patches))
        if cached is None and (not reach or grid.patches == 1):
            return new  # a single patch without one before
        before = own[:, 0, :0]
        if cached is not None:
            cached = cached.to(new.dtype)
            before = torch.where(at(grid.fresh), turned(cached[:, grid.size :]), cached[:, :reach]) if reach else before
            first = self.completed(own[:, 0], cached[:, reach:])[:, None]
            own = first if grid.patches == 1 else torch.cat([first, own[:, 1:]], 1)
        elif reach:
            before = torch.zeros_like(own[:, 0, :reach])
        if reach:
            ends = own[:, :-1, grid.size - reach :]
            ends = turned(ends.flatten(0, 1)).view(ends.shape)
            own = torch.cat([torch.cat([before[:, None], ends], 1), own], 2)
        return own.flatten(0, 1)

    def completed(self, new: Tensor, cached: Tensor) -> Tensor:
        """Line 0 by place `[batch, size, ...]`: places read before this call, then new ones."""
        grid = self.grid
        places = torch.arange(grid.size, device=new.device)
        if grid.patches == 1:
            rows = torch.arange(len(new), device=new.device)[:, None]
            new = new[rows, (places - grid.begin[:, None]).clamp(0, grid.width - 1)]
        # Places after the newest are undefined: they are written before they are read.
        return torch.where(at(places >= grid.filled[:, None]), new, cached)

    def newest(self, slots: Tensor) -> Tensor:
        """The last line of each row: the cache to continue from."""
        lines = slots.unflatten(0, (-1, self.grid.patches))
        return lines[torch.arange(len(lines), device=lines.device), self.grid.last]


def at(mark: Tensor) -> Tensor:
    """Unsqueeze a mask `[batch]` or `[batch, size]` to broadcast to keys `[batch, places, heads, head_dim]`."""
    return mark.reshape(*mark.shape, *(1,) * (4 - mark.ndim))
