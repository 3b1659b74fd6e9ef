"""Weights of other projects to a run of ours, and back.

folder ─ options ─▶ Recipe ─ sketch ─▶ our names ─ names.Match ─▶ theirs ─ compared ─ read, joined ─▶ checkpoint
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bytelm.checkpoint import store, tensors
from bytelm.checkpoint.assemble import Recipe, trained, weights_of
from bytelm.config import build, merge, to_mapping
from bytelm.errors import CheckpointError, ConfigError, ResourceError
from bytelm.exchange import files, hf, megabyte, meta, names
from bytelm.exchange.files import Weights, json_in
from bytelm.exchange.hf import CONFIG
from bytelm.exchange.names import SCORER, Dialect, Match
from bytelm.models import blt
from bytelm.scorers import transformer

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
MODALITY = "bytelm_modality"  # a key of ours in config.json, which other libraries pass over
KNOWN = {"hf": "lm_head.weight", "meta": "local_encoder.tok_embeddings.weight"}  # a name that such a model has
CONTEXT = 8192  # bytes, of a checkpoint that says nothing of its length: that of the MEGABYTE paper


@dataclass(frozen=True)
class Converted:
    """A run that was made of other weights, or would be: its parameters, and bytes of its context."""

    parameters: int
    context: int
    table: list[tuple[str, str, str]]
    """Of each tensor of theirs its name, dtype and shape, and the name of ours; "" where it is left out."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint of another project, of which nothing but names and shapes was read yet."""

    recipe: Recipe
    context: int
    weights: Weights
    matches: list[Match]
    layer: int
    """The encoder's layer whose cross-attention counts."""


def convert(source: Path, layout: Dialect, run: Path, sets: Mapping[str, Any], *, dry_run: bool = False) -> Converted:
    """Make a run of a published BLT, its weights in the precision that they have there.

    `sets` is merged into the recipe, for what a folder says wrongly or not at all. Raises CheckpointError with a table
    of differences where the weights are not those that the options describe, ConfigError for an option that is not
    supported, ResourceError where the disk refuses. The run must not exist yet. In a `dry_run` names and shapes are
    compared, no weight is read, and nothing is written.
    """
    fresh(run)
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder: name the one that holds the weights and their config.json")
    with ExitStack() as stack:
        opened = opened_at(source, layout, sets, stack)
        likes, expected = sketch(opened.recipe), dict[str, Tensor]()
        for match in opened.matches:
            expected |= match.split(likes[match.ours])
        found = {name: weight for name, weight in opened.weights.items() if name in expected or not idle(name, opened)}
        files.check(expected, found, source)
        table = rows(opened)
        if dry_run:
            return Converted(sum(like.numel() for like in likes.values()), opened.context, table)
        ours = {match.ours: joined(match, found, source) for match in opened.matches}
    return keep(run, opened.recipe, opened.context, ours, {"from": layout, "name": source.resolve().name}, table)


def rows(opened: Opened) -> list[tuple[str, str, str]]:
    """The table of a `Converted`."""
    ours = {name: match.ours for match in opened.matches for name in match.theirs}
    return [(name, store.kind(weight.like), ours.get(name, "")) for name, weight in sorted(opened.weights.items())]


def convert_megabyte(source: Path, run: Path, options: Mapping[str, Any], *, dry_run: bool = False) -> Converted:
    """Make a run of a checkpoint of MEGABYTE-pytorch or MBLM: a file, or a folder that holds one.

    `options` are its constructor's, for what tensors do not tell: see `exchange.megabyte`. Raises as `convert` does.
    """
    fresh(run)
    file = megabyte_file(source)
    with ExitStack() as stack:
        theirs = {name: weight.read() for name, weight in files.weights_in(file, stack).items()}
        recipe = megabyte.recipe(theirs, options)
        ours = megabyte.renamed(theirs, recipe)
    context = megabyte.context(recipe.model, options) or CONTEXT
    table = megabyte.rows(theirs, recipe)
    if dry_run:
        return Converted(sum(tensor.numel() for tensor in ours.values()), context, table)
    return keep(run, recipe, context, ours, {"from": "megabyte", "name": file.resolve().name}, table)


def megabyte_file(source: Path) -> Path:
    """The file of weights that a path names, or that lies in it alone. Raises CheckpointError."""
    found = [file for file in sorted(source.iterdir()) if file.suffix in SUFFIXES] if source.is_dir() else [source]
    if len(found) != 1:
        names_found = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{source} has {len(found)} files of weights ({names_found}): name the one to convert")
    return found[0]


def hf_weights(source: Path) -> Path:
    """The file of weights in a folder for transformers, or the index of several."""
    index = source / f"{hf.WEIGHTS}{files.INDEX}"
    return index if index.exists() else source / hf.WEIGHTS


def keep(
    run: Path,
    recipe: Recipe,
    context: int,
    ours: Mapping[str, Tensor],
    origin: Mapping[str, str],
    table: list[tuple[str, str, str]],
) -> Converted:
    """Write the one checkpoint of a run. Raises ResourceError; nothing is left where the disk refuses."""
    state = {"recipe": to_mapping(recipe), "context": context, "bytes": 0, "seconds": 0.0, "skipped": 0}
    state |= {"converted": dict(origin)}
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {run} ({error.strerror}): name another place") from error
    try:
        store.save(run, 0, {"model": ours}, state)
    except BaseException:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # so that the same command can be given again
        raise
    return Converted(sum(tensor.numel() for tensor in ours.values()), context, table)


def fresh(path: Path) -> None:
    """Refuse a place where something lies already. Raises CheckpointError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already: name a new folder")


def opened_at(source: Path, layout: Dialect, sets: Mapping[str, Any], stack: ExitStack) -> Opened:
    """What a folder holds."""
    if layout == "hf":
        recipe, context, layer = hf.recipe(source)
        weights = files.unwrapped(files.weights_in(hf_weights(source), stack), KNOWN[layout])
    else:
        _, file, home = meta.layout(source)
        weights = files.unwrapped(files.weights_in(file, stack), KNOWN[layout])
        if (home / meta.PICKLED).exists():
            own = files.unwrapped(files.weights_in(home / meta.PICKLED, stack), "tok_embeddings.weight")
            weights |= {f"{SCORER}.{name}": weight for name, weight in own.items()}
        (recipe, context), layer = meta.recipe(source, weights), 0
    modality = json_in(source / CONFIG).get(MODALITY) if (source / CONFIG).exists() else None
    if modality is not None:  # of a run of ours that was exported
        recipe = build(Recipe, {**to_mapping(recipe), "modality": modality}, f"{source / CONFIG}: {MODALITY}")
    if sets:
        recipe = build(Recipe, merge(to_mapping(recipe), sets), "--set")
    if not isinstance(recipe.model, blt.Config):
        raise ConfigError("--set model.name: what is converted is a BLT")
    if recipe.scored and not isinstance(recipe.scorer, transformer.Config):
        raise ConfigError("--set scorer.name: the entropy model that is converted is a Transformer")
    return Opened(recipe, context, weights, names.matches(sketch(recipe), recipe.model, layout, layer), layer)


def sketch(recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of a recipe's model, without memory. Raises ConfigError for patching that lacks a threshold."""
    return recipe.blank().state_dict()


def idle(name: str, opened: Opened) -> bool:
    """Whether a tensor that is not expected means nothing.

    So it is with tables of angles, cross-attention that is overwritten by the next layer's, and the entropy model of
    patches that ask none.
    """
    if found := re.match(r"model\.local_encoder\.cross_attn_layers\.(\d{1,4})\.", name):
        return int(found[1]) < opened.layer
    if name.startswith((f"{SCORER}.", "model.patcher.")) and not opened.recipe.scored:
        return True
    return name.endswith((".inv_freq", ".freqs_cis")) or name == "freqs_cis"


def joined(match: Match, weights: Weights, source: Path) -> Tensor:
    """One of our tensors; float64 becomes float32, which a model computes in.

    Raises CheckpointError for a value that is no number.
    """
    parts = {name: weights[name].read() for name in match.theirs}
    parts = {name: part.float() if part.dtype == torch.float64 else part for name, part in parts.items()}
    store.check_keys(parts, parts, source)
    return match.join(list(parts.values())).contiguous()


# --- the other way ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A folder that was written: its parameters, and the name of what its bytes stand for ("": the bytes of files)."""

    parameters: int
    modality: str


def export(run: Path, layout: Dialect, folder: Path, sets: Mapping[str, Any]) -> Exported:
    """Write the newest checkpoint of a run in another project's layout.

    `sets` is merged into the recipe first. Raises CheckpointError, ConfigError for what that layout cannot say, and
    ResourceError; `folder` is then as it was.
    """
    fresh(folder)
    checkpoint, state = trained(run)
    recipe = build(Recipe, merge(state["recipe"], sets), str(checkpoint / store.STATE))
    context = int(state["context"])
    texts: dict[str, Any] = meta.configs(recipe, context) if layout == "meta" else texts_of_hf(recipe, context)
    modality = None if recipe.modality is None else to_mapping(recipe)["modality"]
    if modality is not None:
        texts[CONFIG][MODALITY] = modality
    ours = weights_of(checkpoint)
    expected = {name: like.to(ours[name].dtype) if name in ours else like for name, like in sketch(recipe).items()}
    store.check_keys(expected, ours, str(checkpoint))
    model = cast("blt.Config", recipe.model)
    theirs: dict[str, Tensor] = {}
    for match in names.matches(ours, model, layout, 0):
        theirs |= match.split(ours[match.ours])
    own = {name.removeprefix(f"{SCORER}."): theirs.pop(name) for name in [*theirs] if name.startswith(f"{SCORER}.")}
    try:
        write(folder, texts, theirs, own)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save where the disk is full
        reason = getattr(error, "strerror", None) or files.first_line(error)
        raise ResourceError(f"cannot write {folder} ({reason}): make room, or name another place") from error
    return Exported(sum(tensor.numel() for tensor in ours.values()), modality["name"] if modality else "")


def texts_of_hf(recipe: Recipe, context: int) -> dict[str, Any]:
    """The JSON files of a folder for transformers, and its card."""
    config = hf.config(recipe, context)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "padding_side": "right"}
    tokenizer |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<boe>"}
    tokenizer["split_special_tokens"] = True  # or a "</s>" in a text would be read as EOS
    return {
        hf.CONFIG: config,
        "generation_config.json": generation,
        "tokenizer.json": hf.tokenizer(),
        "tokenizer_config.json": tokenizer,
        hf.CARD: hf.CARD_TEXT,
    }


def write(folder: Path, texts: Mapping[str, Any], weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """All files of a folder, aside first: it is there whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as name:
        aside = Path(name) / folder.name
        for place, text in texts.items():
            (aside / place).parent.mkdir(parents=True, exist_ok=True)
            content = text if isinstance(text, str) else json.dumps(text, indent=1) + "\n"
            (aside / place).write_text(content, encoding="utf-8")
        with (aside / hf.WEIGHTS).open("xb") as file:
            for piece in tensors.pieces(tensors.header(weights, {"format": "pt"}), weights):
                file.write(piece)
        if own:
            torch.save({"model": {key: value.clone() for key, value in own.items()}}, aside / SCORER / meta.PICKLED)
        if folder.exists():
            folder.rmdir()
        shutil.move(aside, folder)
