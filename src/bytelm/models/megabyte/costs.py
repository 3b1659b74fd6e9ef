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
            window = config.stack(level).attention_window
            seen = size + config.reach if window is None else min(context, window)
            found += kaplan(config.stack(level), seen) / config.unit(level)
        return found + output(config.dims[-1])

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`."""
        model, config = self.model, self.model.config
        found = (weights(model.outer) + cached(config.stack(0), length / config.patch)) / config.patch
        stages = [*model.inner, *([] if model.line is None else [model.line])]
        for level, (embed, inner) in enumerate(zip(model.embed, stages, strict=True)):
            # Per position: embedding of its bytes, and the slices of its output for the stage below.
            found += weights(embed, inner.narrow, inner.condition) / config.unit(level)
            seen = inner.size / 2 + inner.reach if inner is not model.line else length
            found += (weights(inner.stack) + cached(config.stack(level + 1), seen)) / config.unit(level + 1)
        return 2 * (found + model.table.weight.numel())

    def other_operations(self) -> float:
        """`dim` additions per n-gram."""
        config = self.model.config
        return len(config.ngram_sizes) * (1 + config.ngram_output) * config.dims[-1]

    def multiplied_tables(self) -> int:
        """The byte table is tied to the output matrix."""
        return self.model.table.weight.numel()
