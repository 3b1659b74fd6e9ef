"""Costs of MEGABYTE-pytorch's variant of MEGABYTE, see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, cached, kaplan, output, weights
from bytelm.models.megabyte_pytorch.model import MegabytePyTorch


class Costs(ArchitectureCosts):
    """Costs of MEGABYTE-pytorch."""

    model: MegabytePyTorch

    def paper(self, context: int, mean: float) -> float:
        """As `models.megabyte.costs`: without start tokens, and the projections of patches and outputs."""
        config = self.model.config
        contexts = (context / config.patch, *config.sizes)
        found = (kaplan(config.stack(level), seen) / config.unit(level) for level, seen in enumerate(contexts))
        return sum(found) + output(config.dims[-1])

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`. A start token is read together with the position after it."""
        model, config = self.model, self.model.config
        found = float(weights(model.head))
        for level, part in enumerate((*model.outer, model.inner)):
            stack, between = config.stack(level), 0 < level < len(config.sizes)
            seen = config.sizes[level - 1] / 2 if level else length / config.patch
            read = 1 - 1 / config.sizes[level - 1] if between else 1.0  # the last sub-patch of a patch is not read
            found += read * (weights(part) + cached(stack, seen)) / config.unit(level)
        return 2 * found
