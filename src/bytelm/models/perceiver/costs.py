"""Costs of PerceiverAR, see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, appendix_b, cached, output, weights
from bytelm.models.perceiver.model import PerceiverAR


class Costs(ArchitectureCosts):
    """Costs of PerceiverAR."""

    model: PerceiverAR

    def paper(self, context: int, mean: float) -> float:
        """Not in its paper: the cross-attention layer and those over latents, counted as Transformer layers."""
        config = self.model.config
        return appendix_b(config.cross(), context) + appendix_b(config.inner(), context) + output(config.dim)

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`; in the middle of a block."""
        config = self.model.config
        caches = cached(config.cross(), length) + cached(config.inner(), min(length, config.latents / 2))
        return 2 * (weights(self.model) + caches)
