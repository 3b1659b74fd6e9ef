"""Costs of H-Net, see `interfaces.costs`."""

from __future__ import annotations

from bytelm.interfaces.costs import ArchitectureCosts, cached, weights
from bytelm.models.hnet.layers import MixedConfig
from bytelm.models.hnet.model import HNet
from bytelm.nn.transformer import StackConfig


class Costs(ArchitectureCosts):
    """Costs of H-Net. The paper counts the FLOPs that are executed, as the default does."""

    model: HNet

    def read(self, length: int, mean: float) -> float:
        """See `ArchitectureCosts`; inner stages at the lengths at which training aims."""
        model, config = self.model, self.model.config
        per_byte, found = 1.0, float(weights(model.head))
        for stage, part in enumerate(model.chunking_stages()):
            seen = sum(kept(one(stage), length * per_byte) for one in (config.encoder, config.decoder))
            own = weights(part.encoder, part.router, part.residual, part.decoder)
            found += per_byte * (own + seen)
            per_byte /= mean if stage == 0 else config.ratios[stage]
        innermost = weights(model.innermost) + kept(config.innermost(), length * per_byte)
        return 2 * (found + per_byte * innermost)

    def other_operations(self) -> float:
        """`dim` additions per n-gram and place."""
        return self.model.embed.lookups * self.model.embed.parts * self.model.config.dims[0]


def kept(stack: StackConfig, seen: float) -> float:
    """Elements of the state of a stack that has read so many positions."""
    return stack.remembered(seen) if isinstance(stack, MixedConfig) else cached(stack, seen)
