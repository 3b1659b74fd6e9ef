"""AdamW with decay on matrices alone, and the learning rate over the course of a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from bytelm.train.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Norms and embedding tables are not decayed.

    A row of an embedding is touched only by the bytes that look it up; decay would shrink the rare ones to nothing.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1 and id(p) not in embeddings]
    ids = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in ids], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """The rate at a step (from 0 on), when `fraction` of the run's budget is used up."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return config.learning_rate * warm * (config.final_rate + (1 - config.final_rate) * cosine)
