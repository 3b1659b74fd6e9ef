"""Models that can be trained, and windows of random bytes to train them on."""

from __future__ import annotations

from dataclasses import replace

import torch

from bytelm.checkpoint.assemble import Recipe
from bytelm.data.sampler import Batch, Sampler
from bytelm.interfaces.model import ByteModel
from bytelm.patching import fixed
from bytelm.training.config import TrainConfig
from bytelm.training.settings import configure
from bytelm.units import BOS

PATCH = 5


class Windows(Sampler):
    """Documents of random bytes, patches of five."""

    elsewhere = False

    def __init__(self, config: TrainConfig, patched: bool) -> None:
        self.shape, self.patched = (config.batch, config.context_length + 1), patched

    def epoch_of(self, step: int) -> int:
        return 0

    def batch(self, step: int) -> Batch:
        ids = torch.randint(0, 256, self.shape, generator=torch.Generator().manual_seed(step))
        ids[:, 0] = BOS
        opens = (torch.arange(self.shape[1]) % PATCH == 0).expand(self.shape)
        return Batch(ids.numpy(), opens.numpy() if self.patched else None)


def made(preset: str, *sets: str) -> tuple[ByteModel, TrainConfig]:
    config = configure(preset, None, ["train.precision=bfloat16", *sets], steps=10)
    recipe = Recipe(config.model, fixed.Config(size=PATCH)) if config.model.patched else replace(config.recipe)
    model = recipe.build()
    model.init_weights(0)
    return model, config.train
