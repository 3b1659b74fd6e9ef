"""The kernels of this machine, and what decoders build of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.decoding.base import CHUNK, Ints, Reals
from bytelm.decoding.blt import Hashed, Pool
from bytelm.decoding.megabyte import Embedding, Stage
from bytelm.decoding.stacks import Layers
from bytelm.models.blt import BLT
from bytelm.models.megabyte import Inner
from bytelm.native.kernels import Kernels
from bytelm.nn.concatenate import PatchEmbedding
from bytelm.nn.embed import NgramEmbedding


class Host(Kernels):
    """See `base.Backend`: activations are arrays."""

    chunk = CHUNK
    repeats = True

    @property
    def host(self) -> Kernels:
        """See `Backend`."""
        return self

    def precise(self) -> Host:
        """See `Backend`."""
        return Host.open(self.exact, team=self.team)

    def instead(self, x: Reals, where: NDArray[np.bool_], line: Reals) -> Reals:
        """See `Backend`."""
        return np.where(where[:, None], line, x)

    def layers(self, *args: Any, **options: Any) -> Layers:
        """See `Backend`."""
        return Layers(self, *args, **options)

    def pooling(self, model: BLT, kept: list[Reals], slots: int) -> Pool:
        """See `Backend`."""
        return Pool(self, model, kept, slots)

    def hashed(self, embed: NgramEmbedding, ids: Ints) -> Hashed:
        """See `Backend`."""
        return Hashed(self, embed, ids)

    def patches(self, embed: PatchEmbedding) -> Embedding:
        """See `Backend`."""
        return Embedding(self, embed)

    def stage(self, inner: Inner, rows: int) -> Stage:
        """See `Backend`."""
        return Stage(self, inner, rows)
