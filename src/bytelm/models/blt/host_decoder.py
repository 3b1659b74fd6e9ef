"""The parts of BLT's decoder as arrays on the host."""

from __future__ import annotations

from torch import Tensor

from bytelm.interfaces.decoder import Ints, Reals
from bytelm.models.blt.model import BLT
from bytelm.native import kernels as native
from bytelm.native.kernels import Kernels, address, array_of
from bytelm.nn.cross import CrossAttention
from bytelm.nn.norm import EPS


class Pool:
    """`Encoder.patches`: a patch's queries, from the encoder's outputs at its bytes."""

    def __init__(self, kernels: Kernels, model: BLT, kept: list[Reals], slots: int) -> None:
        config, self.kernels = model.config, kernels
        self.bytes = 0
        self.arrays: list[Reals] = []
        self.weights: list[native.Matrix] = []
        layers: list[native.PoolLayer] = []
        for layer, states in zip(model.encoder.cross, kept, strict=True):
            assert isinstance(layer, CrossAttention)
            norms = [kernels.vector(norm.weight) for norm in (layer.query_norm, layer.key_norm)]
            self.arrays += norms
            linear = [self.matrix(part.weight) for part in (layer.query, layer.key_value, layer.out)]
            layers.append(native.PoolLayer(address(states), *map(address, norms), *linear))
        self.layers, self.held = array_of(native.PoolLayer, layers), layers
        shape = (len(layers), config.local_dim, config.cross_heads, config.queries, slots)
        self.split = self.matrix(model.encoder.split.weight)
        self.pool = native.Pool(*shape, EPS, self.split, self.layers)

    def matrix(self, weight: Tensor) -> native.Matrix:
        """A linear layer's weight, kept alive and counted."""
        found = self.kernels.matrix(weight)
        self.bytes += found.bytes
        self.weights.append(found)
        return found

    def patches(self, row: Ints, first: Ints, last: Ints) -> Reals:
        """Patches `[n, queries · dim]` of the bytes at positions first..last."""
        return self.kernels.pool(self.pool, row, first, last)
