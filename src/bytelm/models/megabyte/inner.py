"""A stage inside the patches of the one above (MEGABYTE, eqs. 4-5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.models.megabyte.grid import Grid, PatchView
from bytelm.nn.attention import Cache
from bytelm.nn.init_weights import fill, init_weights
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.transformer import Stack

if TYPE_CHECKING:
    from bytelm.models.megabyte.model import Config


class Inner(nn.Module):
    """A stage inside the patches of the one above: each patch separately, from its output of that stage."""

    def __init__(self, config: Config, level: int) -> None:
        super().__init__()
        self.size, self.reach = config.sizes[level - 1], config.reach
        above, dim = config.dims[level - 1], config.dims[level]
        self.part = -(-above // self.size)  # the paper's D_G
        whole = self.part * self.size == above
        self.narrow = nn.Identity() if whole else Linear(above, self.part * self.size)
        self.condition = Linear(self.part, dim)  # w_GL
        self.stack = Stack(config.stack(level))
        self.norm = RMSNorm(dim)

    def init_weights(self, seed: int) -> None:
        """Initialise, with slices of the output above at the scale of byte vectors."""
        config = self.stack.config
        init_weights(self, max(1, config.layers), seed)
        generator = torch.Generator().manual_seed(seed)
        fill(self.condition.weight, (self.part * config.dim) ** -0.5, generator)

    def flops(self, positions: int) -> int:
        """FLOPs of the matmuls for so many positions, the first of which starts a patch."""
        lines = -(-positions // self.size)
        width = self.size if lines > 1 else positions
        slots = self.size + self.reach if lines > 1 else positions
        config, cells = self.stack.config, lines * width
        linear = 2 * cells * (4 * config.dim**2 + 3 * config.dim * config.hidden())
        inside = config.layers * (linear + 4 * config.dim * cells * slots)
        narrow = 2 * lines * self.narrow.weight.numel() if isinstance(self.narrow, nn.Linear) else 0
        return inside + narrow + 2 * cells * self.part * config.dim

    def initial_state(self, batch: int, device: torch.device) -> tuple[Cache, ...]:
        """The empty caches of rows: `reach` + `size` slots."""
        config = self.stack.config
        room = torch.zeros(batch, self.reach + self.size, config.heads, config.dim // config.heads, device=device)
        return (Cache(room, room),) * config.layers

    def forward(
        self,
        x: Float[Tensor, "batch patches width dim"],
        grid: Grid,
        above: Float[Tensor, "batch patches above"],
        caches: tuple[Cache, ...] | None,
    ) -> tuple[Float[Tensor, "batch patches width dim"], tuple[Cache, ...] | None]:
        """The stage over a grid of positions; `above`: the output of the stage above for each patch."""
        parts = self.narrow(above).unflatten(-1, (self.size, self.part))
        if grid.patches == 1:
            rows = torch.arange(len(x), device=x.device)[:, None]
            places = grid.begin[:, None] + torch.arange(grid.width, device=x.device)
            parts = parts[rows, 0, places.clamp(max=self.size - 1)][:, None]
        x = (x + self.condition(parts)).flatten(0, 1)
        config = self.stack.config
        view = PatchView.of(grid, self.reach, caches is not None, config.dim // config.heads, config.theta)
        kept: list[Cache] = []
        for index, block in enumerate(self.stack.blocks):  # not `stack(x)`: patches are recomputed, not single blocks
            x, cache = block(x, view, caches[index] if caches is not None else None)
            if cache is not None:
                kept.append(cache)
        return self.norm(x).unflatten(0, (-1, grid.patches)), None if caches is None else tuple(kept)
