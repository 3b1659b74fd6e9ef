"""Costs of the linear Transformer, see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, output, weights
from bytelm.models.linear.model import LinearTransformer


class Costs(ArchitectureCosts):
    """Costs of the linear Transformer."""

    model: LinearTransformer

    def paper(self, context: int, mean: float) -> float:
        """MEGABYTE, section 3.1: attention counts 9 D per layer."""
        stack = self.model.config.stack()
        return stack.layers * (stack.products(1) + 9 * stack.dim) + output(self.model.config.dim)

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`; sums are float32."""
        config = self.model.config
        return 2 * weights(self.model) + 4 * config.layers * config.dim * (config.dim // config.heads + 1)
