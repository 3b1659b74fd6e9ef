"""Checkpoints of H-Net's public code (goombalab/hnet): see `exchange.format`.

hnet_2stage_XL.pt       the state dict, also as safetensors
hnet_2stage_XL.json     the options, under this name or as config.json, beside it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, merge, to_mapping
from bytelm.errors import CheckpointError, ConfigError, UsageError
from bytelm.exchange import files
from bytelm.exchange.format import Reading
from bytelm.find import name_of
from bytelm.interfaces.model import ByteModel
from bytelm.models.hnet import published
from bytelm.models.hnet.model import Config

CONTEXT = 8192  # bytes, as in the paper; no file says
CONFIG, WEIGHTS = "config.json", "model.pt"


def read(source: Path, sets: Mapping[str, Any], stack: ExitStack) -> Reading:
    """See `exchange.format.Format`."""
    file = files.file_at(source)
    weights = files.unwrapped(files.weights_in(file, stack), published.TOP[published.EMBEDDING])
    options = options_of(file)
    recipe = published.described(files.json_in(options), str(options))
    if sets:
        recipe = build(Recipe, merge(to_mapping(recipe), sets), "--set")
        if not isinstance(recipe.model, Config) or recipe.model.published is None:
            raise ConfigError("--set model.name or model.published: only an H-Net as published can be converted")
    table, tensors = published.reading(recipe, weights, file)
    return Reading(file.resolve().stem, recipe, CONTEXT, table, lambda: tensors)


def options_of(file: Path) -> Path:
    """The JSON file beside a file of weights. Raises CheckpointError."""
    own, common = file.with_suffix(".json"), file.with_name(CONFIG)
    if found := [one for one in (own, common) if one.exists()]:
        return found[0]
    raise CheckpointError(f"{file} has neither {own.name} nor {CONFIG} beside it: put the one published with it there")


def write(folder: Path, recipe: Recipe, context: int, ours: dict[str, Tensor]) -> None:
    """See `exchange.format.Format`."""
    if not isinstance(recipe.model, Config):
        raise ConfigError(f"a {name_of(recipe.model)} cannot be exported: --to hnet is the layout of H-Net")
    if recipe.modality is not None:
        raise ConfigError("modality: the published layout has none, and its code would read other bytes")
    options, tensors = published.options(recipe.model), published.exported(recipe.model, ours)
    with files.written(folder) as aside:
        (aside / CONFIG).write_text(json.dumps(options, indent=4) + "\n", encoding="utf-8")
        torch.save(tensors, aside / WEIGHTS)


def compared(source: Path, model: ByteModel, ids: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """See `exchange.format.Format`."""
    raise UsageError("--check: the public code of H-Net needs kernels of a GPU: leave --check out")
