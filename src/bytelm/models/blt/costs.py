"""Costs of BLT, see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, appendix_b, cached, output, weights
from bytelm.models.blt.model import BLT
from bytelm.nn.cross import CrossAttention


class Costs(ArchitectureCosts):
    """Costs of BLT."""

    model: BLT

    def paper(self, context: int, mean: float) -> float:
        """Appendix B, last equation, n_p = `mean`; without the projections between widths."""
        config = self.model.config
        k, dim = config.queries, config.local_dim
        crossed = config.encoder_layers if config.encoder_cross == "all" else 1
        found = appendix_b(config.latent(), context / mean) / mean
        found += appendix_b(config.encoder(), context) + appendix_b(config.decoder(), context) + output(dim)
        found += cross(crossed, dim, keys=mean, ratio=mean / k) * k / mean
        return found + cross(config.decoder_layers, dim, keys=k, ratio=k / mean)

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`."""
        config, encoder, decoder = self.model.config, self.model.encoder, self.model.decoder
        keys = [part.key_value for part in decoder.cross if isinstance(part, CrossAttention)]  # of patches, cached
        widen, latent = self.model.widen, self.model.latent
        patchwise = weights(encoder.split, encoder.cross, widen, latent, decoder.split, *keys)
        bytewise = weights(encoder, widen, latent, decoder) - patchwise
        bytewise += cached(config.encoder(), length) + cached(config.decoder(), length)
        return 2 * (bytewise + (patchwise + cached(config.latent(), length / mean)) / mean)

    def other_operations(self) -> float:
        """`dim` additions per n-gram and place; cross-attention: bytes × k scores and sums, both ways, per layer."""
        config = self.model.config
        ngrams = len(config.ngram_sizes) * config.ngram_functions * (1 + config.ngram_output)
        crossed = len(self.model.encoder.cross) + config.decoder_layers
        return (ngrams + 4 * config.queries * crossed) * config.local_dim


def cross(layers: int, dim: int, keys: float, ratio: float) -> float:
    """A query of cross-attention (BLT, App. B): Attn(l, h, m=keys), halved as if causal, and QKVO(l, h, r=ratio)."""
    return layers * (4 * dim * (keys + 1) / 2 + (2 * ratio + 2) * 2 * dim**2)
