"""Costs of the Transformer, see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, appendix_b, cached, output, weights
from bytelm.models.transformer.model import ByteTransformer
from bytelm.units import VOCAB


class Costs(ArchitectureCosts):
    """Costs of the Transformer over bytes or tokens."""

    model: ByteTransformer

    def paper(self, context: int, mean: float) -> float:
        """BLT's Appendix B."""
        config = self.model.config
        found = appendix_b(config.stack(), context) + output(config.dim, config.vocabulary)
        return found / (mean if config.vocabulary > VOCAB else 1.0)

    def other_operations(self) -> float:
        """`dim` additions per n-gram and place."""
        ngrams = self.model.ngrams
        return 0.0 if ngrams is None else ngrams.lookups * ngrams.parts * self.model.config.dim

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`."""
        return 2 * (weights(self.model) + cached(self.model.config.stack(), length))
