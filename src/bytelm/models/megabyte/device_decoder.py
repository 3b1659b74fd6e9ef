"""The parts of MEGABYTE's decoder as tensors on a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.decoding.graphs import Graphs, filled
from bytelm.decoding.tensors import Tensors
from bytelm.interfaces.decoder import Ints
from bytelm.models.megabyte import host_decoder
from bytelm.models.megabyte.embedding import PatchEmbedding


class Embedding(host_decoder.Embedding):
    """Patches from ids, see `host_decoder.Embedding`."""

    def __init__(self, device: Tensors, embed: PatchEmbedding) -> None:
        super().__init__(device, embed)
        self.device, self.graphs = device, Graphs(device.recorder)

    def patches(self, ids: Ints, row: Ints, last: Ints) -> Tensor:
        """The patches `[n, dim]` that end at positions `last`."""
        index = filled(np.arange(len(row)))
        offset = last[index, None] - (self.embed.size + self.reach) + 1 + np.arange(self.embed.size + self.reach)
        real = np.maximum(offset, 0)
        places = self.embed.index(torch.from_numpy(real)).numpy()
        return self.graphs(self._patches, np.stack([ids[row[index, None], real], places, offset]))[: len(row)]

    def _patches(self, plan: Tensor) -> Tensor:
        ids, places, offset = plan
        dtype, size, width = self.device.dtype, self.embed.size, ids.shape[1]
        x = F.embedding(ids, self.byte).to(dtype) + F.embedding(places, self.position).to(dtype)
        for taps, weight in self.filters:
            back = torch.arange(taps - 1, -1, -1, device=x.device)
            at = torch.arange(width, device=x.device)[:, None] - back
            seen = (offset[..., None] >= back) & (at >= 0)
            line = torch.where(seen[..., None], x[:, at.clamp(min=0)], 0.0)
            x = x + F.relu(weight(line.flatten(2)))
        first = offset[:, width - size :] < 0
        pad = torch.cat([self.pad, self.pad[:1]])  # the last place of a patch is never a pad
        x = torch.where(first[..., None], pad, x[:, width - size :]).flatten(1)
        return x if self.widen is None else self.widen(x).to(dtype)


class Stage(host_decoder.Stage):
    """A stack inside patches, see `host_decoder.Stage`."""

    def open(self, row: Ints, patch: Ints, above: Tensor) -> None:
        """See `host_decoder.Stage`."""
        parts = self.kernels.linear(self.narrow, above) if self.narrow else above
        given = self.kernels.linear(self.condition, parts.unflatten(1, (self.size, self.part)))
        self.given.flatten(0, 1).index_copy_(0, self.sent(row, patch), given)

    def stale(self, row: Ints, patch: Ints) -> None:
        """See `host_decoder.Stage`."""
        given = self.given.flatten(0, 1)
        given.index_copy_(0, self.sent(row, patch), given.index_select(0, self.sent(row, patch - 1)))

    def given_at(self, row: Ints, patch: Ints, place: Ints) -> Tensor:
        """See `host_decoder.Stage`."""
        at = (row * self.patches + patch % self.patches) * self.size + place
        return self.given.flatten(0, 2).index_select(0, self.kernels.recorder.sent(at))

    def sent(self, row: Ints, patch: Ints) -> Tensor:
        """Indices of patches, on the device."""
        return self.kernels.recorder.sent(row * self.patches + patch % self.patches)
