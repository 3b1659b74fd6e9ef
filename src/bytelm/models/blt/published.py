"""Published BLTs in any layout: match tensor names, check, read and write.

folder ─ options ─▶ Recipe ─ meta model ─▶ our names ─ names.Match ─▶ theirs ─ checked ─ read, joined ─▶ ours
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bytelm.checkpoint import store, tensors
from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.tensors import Streamed
from bytelm.config import build, merge, to_mapping
from bytelm.errors import ConfigError
from bytelm.exchange import files
from bytelm.exchange.files import Weights, json_in
from bytelm.exchange.format import MODALITY, Reading
from bytelm.find import name_of
from bytelm.models.blt import model as blt
from bytelm.models.blt import names
from bytelm.models.blt.names import ENTROPY_MODEL, Dialect, Match

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "consolidated.pth"


@dataclass(frozen=True)
class Opened:
    """A folder of which only names and shapes were read yet."""

    recipe: Recipe
    weights: Weights
    matches: list[Match]
    layer: int
    """The encoder layer whose cross-attention is used."""


def reading(
    source: Path,
    layout: Dialect,
    described: tuple[Recipe, int],
    weights: Weights,
    sets: Mapping[str, Any],
    layer: int = 0,
) -> Reading:
    """The recipe and context of a folder, overridden by `sets`. Raises as `Format.read`."""
    recipe, context = described
    modality = json_in(source / CONFIG).get(MODALITY) if (source / CONFIG).exists() else None
    if modality is not None:  # exported from a run of ours
        recipe = build(Recipe, {**to_mapping(recipe), "modality": modality}, f"{source / CONFIG}: {MODALITY}")
    if sets:
        recipe = build(Recipe, merge(to_mapping(recipe), sets), "--set")
    if not isinstance(recipe.model, blt.Config):
        raise ConfigError("--set model.name: only a BLT can be converted")
    if recipe.uses_entropy_model and name_of(recipe.entropy_model) != "transformer":
        raise ConfigError("--set entropy_model.name: only a Transformer entropy model can be converted")
    likes = recipe.build_on_meta().state_dict()
    opened = Opened(recipe, weights, names.matches(likes, recipe.model, layout, layer), layer)
    expected = dict[str, Tensor]()
    for match in opened.matches:
        expected |= match.split(likes[match.ours])
    found = {name: weight for name, weight in weights.items() if name in expected or not idle(name, opened)}
    files.check(expected, found, source)
    return Reading(
        source.resolve().name,
        recipe,
        context,
        rows(opened),
        lambda: {match.ours: joined(match, found, source) for match in opened.matches},
    )


def rows(opened: Opened) -> list[tuple[str, str, str]]:
    """The table of a `Converted`."""
    ours = {name: match.ours for match in opened.matches for name in match.theirs}
    return [(name, store.kind(weight.like), ours.get(name, "")) for name, weight in sorted(opened.weights.items())]


def idle(name: str, opened: Opened) -> bool:
    """Whether an unexpected tensor is unused.

    Such are tables of angles, cross-attention overwritten by the next layer's, an entropy model that is not consulted.
    """
    if found := re.match(r"model\.local_encoder\.cross_attn_layers\.(\d{1,4})\.", name):
        return int(found[1]) < opened.layer
    if name.startswith((f"{ENTROPY_MODEL}.", "model.patcher.")) and not opened.recipe.uses_entropy_model:
        return True
    return name.endswith((".inv_freq", ".freqs_cis")) or name == "freqs_cis"


def joined(match: Match, weights: Weights, source: Path) -> Streamed:
    """One of our tensors, float64 cast to float32. While it is read: CheckpointError unless finite."""
    parts = {name: weights[name] for name in match.theirs}
    dtype = functools.reduce(torch.promote_types, (weight.like.dtype for weight in parts.values()))
    dtype = torch.float32 if dtype == torch.float64 else dtype

    def pieces() -> Iterator[Tensor]:
        for name, weight in parts.items():
            yield from files.finite(name, (piece.to(dtype) for piece in weight.pieces()), source)

    likes = [weight.like for weight in parts.values()]
    like = torch.empty((sum(map(len, likes)), *likes[0].shape[1:]), dtype=dtype, device="meta")
    return Streamed(like, (lambda: (match.join(list(pieces())),)) if match.by_id else pieces)


# --- export -----------------------------------------------------------------------------------------------------------


def theirs(recipe: Recipe, layout: Dialect, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under their names."""
    found: dict[str, Tensor] = {}
    for match in names.matches(ours, cast("blt.Config", recipe.model), layout, 0):
        found |= match.split(ours[match.ours])
    return found


def write_folder(folder: Path, recipe: Recipe, texts: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write all files of a folder atomically: `texts` by name, and weights, those of an entropy model separately."""
    if recipe.modality is not None:
        texts[CONFIG][MODALITY] = to_mapping(recipe)["modality"]
    own = {n.removeprefix(f"{ENTROPY_MODEL}."): weights.pop(n) for n in [*weights] if n.startswith(f"{ENTROPY_MODEL}.")}
    with files.written(folder) as aside:
        for place, text in texts.items():
            (aside / place).parent.mkdir(parents=True, exist_ok=True)
            content = text if isinstance(text, str) else json.dumps(text, indent=1) + "\n"
            (aside / place).write_text(content, encoding="utf-8")
        with (aside / WEIGHTS).open("xb") as file:
            for _, piece in tensors.pieces(tensors.header(weights, {"format": "pt"}), weights):
                file.write(piece)
        if own:
            torch.save({"model": {key: value.clone() for key, value in own.items()}}, aside / ENTROPY_MODEL / PICKLED)
