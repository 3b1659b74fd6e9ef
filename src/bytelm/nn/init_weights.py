"""Parameter initialisation: one table, by the kind of module and the name of the weight.

    embeddings                      normal, σ = dim^-1/2
    linear layers                   normal, σ = inputs^-1/2
    ... that end a residual branch  the same, divided by sqrt(2 · layers) (their names are `out` and `down`)
    norms                           ones
    biases                          zeros

Normals are cut at three σ, as in the BLT paper's code lineage.
"""

from __future__ import annotations

import torch
from torch import nn

RESIDUAL = ("out", "down")


def init_weights(model: nn.Module, layers: int, seed: int) -> None:
    """Set every trainable parameter of `model` from `seed`; `layers` is its depth."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        for bias in (p for own_name, p in module.named_parameters(recurse=False) if own_name == "bias"):
            nn.init.zeros_(bias)
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            fan = module.in_features if isinstance(module, nn.Linear) else module.embedding_dim
            sigma = fan**-0.5
            if name.rpartition(".")[2] in RESIDUAL:
                sigma /= (2 * layers) ** 0.5
            fill(module.weight, sigma, generator)
        else:
            raise TypeError(f"{name}: no rule to initialise a {type(module).__name__}; add one to the table")


@torch.no_grad()
def fill(weight: torch.Tensor, sigma: float, generator: torch.Generator) -> None:
    """Truncated normal values, drawn on the CPU so that a seed means the same weights on every device."""
    values = torch.empty(weight.shape)
    nn.init.trunc_normal_(values, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator)
    weight.copy_(values)
