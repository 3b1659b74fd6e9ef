"""From preset, file and --set to a run's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bytelm.config import assignments, build, load_toml, merge, preset, to_mapping
from bytelm.patching import entropy
from bytelm.train.config import RunConfig
from bytelm.units import show_count

DEFAULT_PRESET = "blt-tiny"
DEFAULT_MINUTES = 10.0


def configure(
    preset_name: str | None = None,
    file: str | Path | None = None,
    sets: Sequence[str] = (),
    *,
    steps: int | None = None,
    minutes: float | None = None,
    bytes: int | None = None,
) -> RunConfig:
    """The configuration of a run: a preset, under a TOML file, under `a.b=c` settings, under the limits given here.

    Raises ConfigError, one line that names every unknown key and impossible value.
    """
    mapping = preset(preset_name or DEFAULT_PRESET)
    source = f"preset {preset_name or DEFAULT_PRESET}"
    if file is not None:
        mapping, source = merge(mapping, load_toml(Path(file))), str(file)
    if sets:
        mapping, source = merge(mapping, assignments(sets, "--set")), "--set"
    limits = {"steps": steps, "minutes": minutes, "bytes": bytes}
    given = {name: value for name, value in limits.items() if value is not None}
    train = mapping.get("train", {})
    if given:
        mapping = merge(mapping, {"train": {name: given.get(name, "none") for name in limits}})
    elif not any(train.get(name, "none") != "none" for name in limits):
        mapping = merge(mapping, {"train": {"minutes": DEFAULT_MINUTES}})
    return build(RunConfig, mapping, source)


def describe(name: str) -> dict[str, object]:
    """A preset in a line: its parts, and its true parameter counts, of the model itself built without memory."""
    config = build(RunConfig, merge({"train": {"minutes": DEFAULT_MINUTES}}, preset(name)), f"preset {name}")
    recipe = config.recipe
    with torch.device("meta"):
        if isinstance(recipe.patching, entropy.Config) and not recipe.patching.calibrated:
            recipe = replace(recipe, patching=replace(recipe.patching, threshold=0.0, rise=0.0))
        model = recipe.assemble()
    counts = {key: p.numel() for key, p in model.named_parameters()}
    scorer = sum(count for key, count in counts.items() if key.startswith("patcher."))
    tables = sum(count for key, count in counts.items() if "ngram" in key)
    own = sum(counts.values()) - scorer
    parts = to_mapping(recipe)
    window = config.train.window
    mean = recipe.patching.mean_size if isinstance(recipe.patching, entropy.Config) else 1.0
    return {
        "preset": name,
        "model": parts["model"]["name"],
        "patching": parts["patching"]["name"] if recipe.model.patched else "none",
        "parameters": show_count(own),
        "n-gram tables": show_count(tables) if tables else "none",
        "scorer": show_count(scorer) if scorer else "none",
        "window": window,
        "FLOPs/byte": show_count(model.flops(window, round(window / mean)) / window),
        "counts": {"parameters": own, "ngram_tables": tables, "scorer": scorer},
    }
