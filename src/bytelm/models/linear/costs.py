"""What a linear Transformer costs: see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, output, weights
from bytelm.models.linear.model import LinearTransformer


class Costs(ArchitectureCosts):
    """The linear Transformer's."""

    model: LinearTransformer

    def paper(self, context: int, mean: float) -> float:
        """MEGABYTE, section 3.1: attention is taken for 9 D a layer."""
        stack = self.model.config.stack()
        return stack.layers * (stack.products(1) + 9 * stack.dim) + output(self.model.config.dim)

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`; sums are float32 whatever weights are."""
        config = self.model.config
        return 2 * weights(self.model) + 4 * config.layers * config.dim * (config.dim // config.heads + 1)
