"""Costs of MEGABYTE, see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, cached, kaplan, output, weights
from bytelm.models.megabyte.model import Megabyte


class Costs(ArchitectureCosts):
    """Costs of MEGABYTE."""

    model: Megabyte

    def paper(self, context: int, mean: float) -> float:
        """Section 3.1: 2 (m_g / P + m_l), and Kaplan et al.'s attention: to T / P patches, then a patch and `reach`."""
        config = self.model.config
        found = kaplan(config.stack(0), context / config.patch) / config.patch
        for level, size in enumerate(config.sizes, 1):
            found += kaplan(config.stack(level), size + config.reach) / config.unit(level)
        return found + output(config.dims[-1])

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`."""
        model, config = self.model, self.model.config
        found = (weights(model.outer) + cached(config.stack(0), length / config.patch)) / config.patch
        for level, (embed, inner) in enumerate(zip(model.embed, model.inner, strict=True)):
            # Per position: embedding of its bytes, and the slices of its output for the stage below.
            found += weights(embed, inner.narrow, inner.condition) / config.unit(level)
            stage = weights(inner.stack) + cached(config.stack(level + 1), inner.size / 2 + inner.reach)
            found += stage / config.unit(level + 1)
        return 2 * (found + model.byte.weight.numel())

    def multiplied_tables(self) -> int:
        """The byte table is tied to the output matrix."""
        return self.model.byte.weight.numel()
