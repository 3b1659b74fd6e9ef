"""Every architecture and patching scheme, small; discovered from the folders, so that new files are tested.

A Config that has a classmethod `tiny() -> dict[str, Config]` names the small shapes that reach every path of its file;
one without it is taken as its defaults are.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.find import find, names
from bytelm.interfaces.model import ByteModel
from bytelm.patching.base import Patcher
from bytelm.patching.entropy import EntropyModel
from bytelm.testing.examples import document, row
from bytelm.units import VOCAB


def tiny_models(seed: int = 0) -> Iterator[tuple[str, ByteModel]]:
    """(name, model) for every architecture; the first shape of a patched one with every patcher, others with one."""
    patchers = list(tiny_patchers(seed))
    for name in names("models"):
        for number, (shape, config) in enumerate(shapes("models", name)):
            if not config.patched:
                yield f"{name}{shape}", initialized(config.build(), seed)
                continue
            for which, patcher in patchers if number == 0 else patchers[number :: len(patchers)]:
                yield f"{name}{shape} on {which}", initialized(config.build(patcher), seed)


def tiny_patchers(seed: int = 0) -> Iterator[tuple[str, Patcher]]:
    """(name, patcher) for every patching scheme; those of the entropy patcher alternate between entropy models."""
    for name in names("patching"):
        for (shape, config), (kind, entropy_model) in zip(
            shapes("patching", name), cycle(tiny_entropy_models(seed)), strict=False
        ):
            if config.uses_entropy_model:
                yield f"{name}{shape} of {kind}", calibrated(config, entropy_model, seed).build(entropy_model)
            else:
                yield f"{name}{shape}", config.build()


def tiny_entropy_models(seed: int = 0) -> Iterator[tuple[str, EntropyModel]]:
    """Windowed Transformers with random weights, and a table counted from a few documents."""
    transformer = find("entropy_models", "transformer")
    for kind, reset in (("a Transformer", False), ("a Transformer by lines", True)):
        shape = transformer.Config(layers=1, dim=16, heads=2, attention_window=7, ffn_multiple=16, reset_newline=reset)
        entropy_model = shape.build()
        initialized(entropy_model.model, seed)
        yield kind, entropy_model
    rng = random.Random(seed)
    counted = find("entropy_models", "ngram").Config(order=2, rows=512, reset_newline=True).build()
    counted.count([np.frombuffer(document(rng, 200), np.uint8) for _ in range(20)])
    yield "n-grams by lines", counted


def shapes(floor: str, name: str) -> list[tuple[str, Any]]:
    """The small configurations of one file, each with a suffix to its name."""
    config = find(floor, name).Config
    if not hasattr(config, "tiny"):
        return [("", config())]
    return [(f" ({shape})", small) for shape, small in config.tiny().items()]


def initialized(model: Any, seed: int) -> Any:
    """The model, its parameters set from the seed."""
    model.init_weights(seed)
    return model


def calibrated(config: Any, entropy_model: EntropyModel, seed: int) -> Any:
    """An entropy configuration whose rules are met by about every third byte of the examples."""
    ids = row(random.Random(seed), 1000)[None]
    entropy, _ = entropy_model.entropies(ids, entropy_model.initial_state(1))
    threshold, relative_threshold = (float(x.quantile(0.7)) for x in (entropy, entropy.diff()))
    return dataclasses.replace(config, threshold=threshold, relative_threshold=relative_threshold)


class ScriptedEntropyModel(nn.Module):
    """An entropy model whose every answer is known: the entropy after an id is what the script says of that id."""

    def __init__(self, script: dict[int, float], otherwise: float = 0.0) -> None:
        super().__init__()
        self.table = torch.tensor([script.get(index, otherwise) for index in range(VOCAB)])

    def initial_state(self, batch: int) -> None:
        """There is nothing to remember."""

    def entropies(self, ids: Int[Tensor, "batch new"], state: None) -> tuple[Float[Tensor, "batch new"], None]:
        """See `patching.entropy.EntropyModel`; a script has no context to reset."""
        return self.table[ids], None


class UniformModel(ByteModel):
    """Every id is as likely as every other, so that every byte costs exactly log2(260) bits."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def init_weights(self, seed: int) -> None:
        """There is one parameter, and one value for it."""
        nn.init.zeros_(self.anchor)

    def flops(self, ids: int, patches: int) -> int:
        """Nothing is multiplied."""
        return 0

    def initial_state(self, batch: int) -> None:
        """There is nothing to remember."""

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], None]:
        """See `ByteModel`."""
        return self.anchor.expand(*ids.shape, VOCAB), None
