"""The host backend: kernels on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.decoding.ngrams import HostNgrams
from bytelm.decoding.stacks import Layers
from bytelm.interfaces.decoder import CHUNK, Ints, Reals
from bytelm.native.kernels import Kernels
from bytelm.nn.ngrams import NgramEmbedding


class Host(Kernels):
    """See `interfaces.decoder.Backend`: activations are arrays."""

    chunk = CHUNK
    repeats = True
    prefills = True
    on_device = False

    @property
    def host(self) -> Kernels:
        """See `Backend`."""
        return self

    def precise(self) -> Host:
        """See `Backend`."""
        return Host.open(self.exact, thread_pool=self.thread_pool)

    def instead(self, x: Reals, where: NDArray[np.bool_], line: Reals) -> Reals:
        """See `Backend`."""
        return np.where(where[:, None], line, x)

    def layers(self, *args: Any, **options: Any) -> Layers:
        """See `Backend`."""
        return Layers(self, *args, **options)

    def hashed(self, embed: NgramEmbedding, ids: Ints) -> HostNgrams:
        """See `Backend`."""
        return HostNgrams(self, embed, ids)
