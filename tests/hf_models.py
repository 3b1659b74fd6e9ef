"""Models of every kind as those of transformers, and texts for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import to_mapping
from bytelm.interfaces.model import ByteModel
from bytelm.lm import LM
from bytelm.testing import tiny_models

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from transformers import AutoModelForCausalLM

    from bytelm.hf import BytelmForCausalLM, ByteTokenizer

TEXTS = ["hello world", "", "the quick (brown) fox, jumps! over 1024 déjà vus"]


def lm_of(model: ByteModel) -> LM:
    """An LM of a model made by hand, its recipe taken from its parts."""
    patcher = model.patcher
    entropy_model = getattr(patcher, "entropy_model", None)
    recipe = Recipe(model.config, patcher and patcher.config, entropy_model and entropy_model.config)
    return LM(model.eval(), 64, None, to_mapping(recipe))


MODELS = {name: lm_of(model) for name, model in tiny_models() if model.tokens is None}
BLT = [name for name in MODELS if "entropy" in name]
SOME = [*BLT[:3], "megabyte (three stages)", "transformer (windowed)", "linear (two heads)", "perceiver (blocks of 5)"]
TOKENIZER = ByteTokenizer()


def saved(name: str, folder: Path) -> str:
    MODELS[name].save_pretrained(folder)
    return str(folder)


def wrapped(name: str) -> BytelmForCausalLM:
    return BytelmForCausalLM.from_lm(MODELS[name])


def copied(name: str, folder: Path) -> Any:
    """A model that a test may train."""
    return AutoModelForCausalLM.from_pretrained(saved(name, folder))


def batch(side: str = "left", texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(TOKENIZER(texts, return_tensors="pt", padding=True, padding_side=side))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def everything(model: ByteModel) -> dict[str, Tensor]:
    """Parameters and buffers, those that no file holds among them."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
