"""Patches as the concatenated vectors of their bytes (MEGABYTE, section 2.2 eqs. 1-2, and 2.3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.errors import UsageError
from bytelm.nn.products import Linear
from bytelm.patching.layout import tail
from bytelm.transfer import to_device
from bytelm.units import VOCAB


class CausalConvolution(nn.Module):
    """x_t + relu(sum over k of W_k x_{t-k}), within the document; the paper gives only the filter sizes."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.filter = Linear(size * dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch new dim"],
        offset: Int[Tensor, "batch new"],
        recent: Float[Tensor, "batch reach dim"],
    ) -> tuple[Float[Tensor, "batch new dim"], Float[Tensor, "batch reach_new dim"]]:
        """The layer's output, and its inputs, `recent` and new, concatenated; `offset`: in the document."""
        new = x.shape[1]
        line = torch.cat([recent.to(x.dtype), x], 1)
        ago = torch.arange(self.size - 1, -1, -1, device=x.device)
        taps = torch.stack([line[:, k : k + new] for k in range(self.size)], 2)
        taps = torch.where((ago <= offset[..., None])[..., None], taps, 0.0)
        return x + F.relu(self.filter(taps.flatten(2))), line


@dataclass(frozen=True)
class Recent:
    """The newest byte vectors, and the newest inputs of each filter, for later patches and convolutions."""

    vectors: Float[Tensor, "batch reach dim"]
    inputs: tuple[Float[Tensor, "batch _ dim"], ...]


class PatchEmbedding(nn.Module):
    """h_embed[t] = E[x_t] + E_pos[t], `size` of them concatenated; then a linear layer if the width is not `dim`.

    `positions`: rows of E_pos, as in the paper one per byte of the longest document; None for one per place in a patch,
    so that documents may have any length: the Transformer's rotary positions distinguish patches.
    """

    def __init__(self, dim: int, size: int, byte_dim: int, filters: tuple[int, ...], positions: int | None) -> None:
        super().__init__()
        self.size, self.byte_dim, self.filters, self.limit = size, byte_dim, filters, positions
        self.byte = nn.Embedding(VOCAB, byte_dim)
        self.position = nn.Embedding(positions or size, byte_dim)
        # E_global-pad: in a patch, the places before the first id (BOS) of a document.
        self.pad = nn.Embedding(size - 1, byte_dim)
        self.convolutions = nn.ModuleList(CausalConvolution(byte_dim, width) for width in filters)
        self.widen = nn.Identity() if size * byte_dim == dim else Linear(size * byte_dim, dim)

    def flops(self, ids: int, patches: int) -> int:
        """FLOPs of the matmuls for `patches` patches among `ids` ids."""
        found = sum(2 * ids * width * self.byte_dim**2 for width in self.filters)
        return found + (2 * patches * self.widen.weight.numel() if isinstance(self.widen, nn.Linear) else 0)

    def initial_state(self, batch: int, device: torch.device) -> Recent:
        """The initial state."""

        def none(reach: int) -> Tensor:
            return torch.zeros(batch, reach, self.byte_dim, device=device)

        return Recent(none(self.size - 1), tuple(none(width - 1) for width in self.filters))

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        offset: Int[Tensor, "batch new"],
        slots: Int[Tensor, "batch patches"],
        lengths: Int[Tensor, " batch"],
        recent: Recent,
    ) -> tuple[Float[Tensor, "batch patches dim"], Recent]:
        """The patches that end at `slots` of new ids at `offset` (0 at BOS). Raises UsageError beyond E_pos."""
        first = bool((offset.gather(1, slots) < self.size - 1).any())  # whether one is the first of its document
        index, ids, offset, slots = (to_device(x, self.byte.weight) for x in (self.index(offset), ids, offset, slots))
        x = self.byte(ids) + self.position(index)
        inputs: list[Tensor] = []
        for layer, width, before in zip(self.convolutions, self.filters, recent.inputs, strict=True):
            x, line = layer(x, offset, before)
            inputs.append(tail(line, lengths + width - 1, width - 1))
        line = torch.cat([recent.vectors.to(x.dtype), x], 1)
        rows = torch.arange(len(ids), device=ids.device)[:, None, None]
        places = torch.arange(self.size, device=ids.device)
        patches = line[rows, slots[..., None] + places]
        here = offset.gather(1, slots)
        if first:
            inside: Bool[Tensor, "batch patches size"] = self.size - 1 - places <= here[..., None]
            pad = F.pad(self.pad.weight, (0, 0, 0, 1))
            patches = torch.where(inside[..., None], patches, pad.to(patches.dtype))
        kept = Recent(tail(line, lengths + self.size - 1, self.size - 1), tuple(inputs))
        return self.widen(patches.flatten(2)), kept

    def index(self, offset: Int[Tensor, "batch new"]) -> Int[Tensor, "batch new"]:
        """The row of E_pos for each id. The first bytes of patches have offsets 1, 1 + size, ..."""
        if self.limit is None:
            return (offset - 1) % self.size
        longest = int(offset.max()) + 1 if offset.numel() else 0
        if longest > self.limit:
            raise UsageError(
                f"a document of {longest} ids is longer than model.positions = {self.limit}: read it in shorter "
                'windows, or train with more positions, or with "none"'
            )
        return offset
