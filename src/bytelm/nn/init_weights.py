"""Parameter initialisation: one table, by the kind of module and the name of the weight.

    embeddings                      normal, σ = dim^-1/2
    linear layers                   normal, σ = inputs^-1/2
    ... that end a residual branch  the same, divided by sqrt(2 · layers) (their names are `out` and `down`)
    norms                           ones
    depthwise convolutions          normal, σ = reach^-1/2
    biases                          zeros
    decays and steps of Mamba-2     over the ranges of its paper's code (`nn.mamba`)

Normals are cut at three σ, as in the BLT paper's code lineage.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from bytelm.nn.mamba import Mamba2
from bytelm.nn.sharded import rows_here

RESIDUAL = ("out", "down")
DRAWN = 1 << 22  # numbers that are drawn together


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
        elif isinstance(module, Mamba2):
            module.init_weights(generator)
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
            sigma = inputs(module) ** -0.5
            if name.rpartition(".")[2] in RESIDUAL:
                sigma /= (2 * layers) ** 0.5
            fill(module.weight, sigma, generator)
        else:
            raise TypeError(f"{name}: no rule to initialise a {type(module).__name__}; add one to the table")


def inputs(module: nn.Linear | nn.Embedding | nn.Conv1d) -> int:
    """How many numbers each of a layer's outputs is made of; of an embedding its width."""
    if isinstance(module, nn.Conv1d):
        return math.prod(module.weight.shape[1:])
    return module.in_features if isinstance(module, nn.Linear) else module.embedding_dim


@torch.no_grad()
def fill(weight: torch.Tensor, sigma: float, generator: torch.Generator) -> None:
    """Truncated normal values, drawn on the CPU so that a seed means the same weights on every device.

    And on any number of processes: each draws all rows, some at a time, and keeps its own.
    """
    first, held = rows_here(weight)
    count = max(1, DRAWN // max(1, math.prod(weight.shape[1:])))
    for start in range(0, len(weight), count):
        values = torch.empty(min(count, len(weight) - start), *weight.shape[1:])
        nn.init.trunc_normal_(values, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator)
        own = slice(max(start, first), min(start + len(values), first + len(held)))
        if own.start < own.stop:
            held[own.start - first : own.stop - first].copy_(values[own.start - start : own.stop - start])
