"""Decoders on a device: parts compute on tensors, with integers planned on the host.

host    ids, rows, positions, patches → plan [integers, positions]    one copy per part, from pinned memory
                                 │
device  activations ─► part ─────▼────► activations ─► next part      a CUDA graph for each shape of a plan
                        ring buffers, at fixed addresses
"""

from __future__ import annotations

from typing import Any

from bytelm.decoding.ngrams import DeviceNgrams
from bytelm.decoding.rings import Layers
from bytelm.decoding.tensors import Tensors
from bytelm.interfaces.decoder import Ints
from bytelm.nn.ngrams import NgramEmbedding


class Device(Tensors):
    """See `interfaces.decoder.Backend`."""

    on_device = True

    def layers(self, *args: Any, **options: Any) -> Layers:
        """See `Backend`."""
        return Layers(self, *args, **options)

    def hashed(self, embed: NgramEmbedding, ids: Ints) -> DeviceNgrams:
        """See `Backend`."""
        return DeviceNgrams(self, embed, ids)
