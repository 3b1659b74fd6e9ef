"""From preset, file and --set to a run's configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bytelm.checkpoint import legacy
from bytelm.checkpoint.assemble import resolve_checkpoint
from bytelm.config import assignments, build, load_toml, merge, nominal_size, preset, to_mapping
from bytelm.data.convert import modality_table
from bytelm.data.corpus import Corpus, Index
from bytelm.data.packed import check_options
from bytelm.errors import CheckpointError, ConfigError
from bytelm.evaluate.costs import usual_mean
from bytelm.training.config import RunConfig, TrainConfig
from bytelm.training.memory import predict
from bytelm.units import show_bytes, show_count, show_seconds

DEFAULT_PRESET = "blt-tiny"
DEFAULTS = {"image": "megabyte-image", "audio": "megabyte-audio"}  # of modalities for which fixed patches are best
DEFAULT_MINUTES = 10.0
VARIABLE = "BYTELM_"  # of environment variables; two underscores separate table and key
FINETUNE_LR_SCALE = 0.1  # factor of the learning rate in fine-tuning
LONGEST_STEP = 4  # times the bytes of a preset's step: what a step of one whole document may take


def configure(
    preset_name: str | None = None,
    file: str | Path | None = None,
    sets: Sequence[str] = (),
    *,
    modality: str | None = None,
    packed: str | Path | None = None,
    mix: Sequence[str] = (),
    init_from: str | Path | None = None,
    run: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunConfig:
    """The configuration of a run: a preset, overridden by a TOML file, by variables of the `environment` such as
    BYTELM_TRAIN__BATCH=4, by `a.b=c` settings, and by the arguments.

    `modality` is a name and more words, as in "image:64"; `one_document_a_window` fits the windows to it. `init_from`
    is a run to fine-tune: its model and, without a preset, its hyperparameters but for the learning rate; an
    existing `run` keeps them after `init_from` is gone. `packed` is a folder of `bytelm data pack` to train on,
    whose options are fixed. `mix`: the sources of a mixture and their weights (`RunConfig`).
    Raises ConfigError, one line that names every unknown key, invalid value or conflict with the packed data.
    """
    corpus = None if packed is None else Corpus.open(packed)
    kept = {} if corpus is None else kept_in(corpus.index)
    name = preset_name or DEFAULTS.get((modality or kept.get("modality", {}).get("name", "")).partition(":")[0])
    name = name or DEFAULT_PRESET
    mapping, source = preset(name), f"preset {name}"
    if init_from is not None:
        mapping = going_on(Path(init_from), preset_name, None if run is None else Path(run))
    layers = [(str(packed), kept)] if kept else []
    if file is not None:
        layers.append((str(file), load_toml(Path(file))))
    for variable, value in sorted((environment or {}).items()):
        if variable.startswith(VARIABLE) and "__" in variable:
            key = variable.removeprefix(VARIABLE).lower().replace("__", ".")
            layers.append((variable, assignments([f"{key}={value}"], variable)))
    if sets:
        layers.append(("--set", assignments(sets, "--set")))
    layers += [("--mix", {"mix": list(mix)})] if mix else []
    if modality is not None:
        layers.append((f"--as {modality}", {"modality": modality_table(modality)}))
    base, asked = mapping, dict[str, Any]()
    for _, layer in layers:
        mapping, asked = merge(mapping, layer), merge(asked, layer)
    limits = {"steps": steps, "minutes": minutes, "bytes": bytes}
    given = {name: value for name, value in limits.items() if value is not None}
    train = mapping.get("train", {})
    if given:
        mapping = merge(mapping, {"train": {name: given.get(name, "none") for name in limits}})
    elif not any(train.get(name, "none") != "none" for name in limits):
        mapping = merge(mapping, {"train": {"minutes": DEFAULT_MINUTES}})
    try:
        config = build(RunConfig, mapping, "")
    except ConfigError as error:
        raise ConfigError(f"{blamed(base, layers) or source}{error}") from None
    if corpus is not None:
        check_options(corpus, config.data, config.modality and config.modality.build().table)
    return one_document_a_window(config, asked)


def kept_in(index: Index) -> dict[str, Any]:
    """The options that a corpus was packed with, as tables of a configuration."""
    tables = {"data": index.options and asdict(index.options), "modality": index.modality}
    return {name: table for name, table in tables.items() if table}


def blamed(base: Mapping[str, Any], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The source that made a configuration invalid: the first one after which it is."""
    ending = {"train": {"minutes": DEFAULT_MINUTES}}
    found, sound, mapping = "", True, merge(ending, base)
    for name, layer in layers:
        mapping, before = merge(mapping, layer), sound
        try:
            build(RunConfig, mapping, "")
            sound = True
        except ConfigError:
            sound = False
            found = name if before else found
    return found


def going_on(start: Path, preset_name: str | None, run: Path | None) -> dict[str, Any]:
    """The configuration of a training that starts from the weights of another run. Raises CheckpointError."""
    begun = {} if run is None or not (run / "config.toml").exists() else legacy.current(load_toml(run / "config.toml"))
    try:
        _, state = resolve_checkpoint(start)
    except CheckpointError:
        if begun.get("init_from") == str(start):
            return begun
        raise
    own = start / "config.toml"
    kept = own.exists() and preset_name is None
    base = (
        to_mapping(build(RunConfig, legacy.current(load_toml(own)), str(own)))
        if kept
        else preset(preset_name or DEFAULT_PRESET)
    )
    train = {"learning_rate": TrainConfig.learning_rate, **base["train"], "context_length": state["context"]}
    ids = base["train"].get("context_length", TrainConfig.context_length) * base["train"].get(
        "batch", TrainConfig.batch
    )
    if kept:
        train |= {"steps": "none", "minutes": "none", "bytes": "none"}
    else:
        train["context_length"] = min(train["context_length"], ids)
        train["batch"] = max(1, ids // train["context_length"])
    train["learning_rate"] *= FINETUNE_LR_SCALE
    others = {
        key: table for key, table in base.items() if key not in ("model", "patching", "entropy_model", "modality")
    }
    return {**others, **state["recipe"], "train": train, "init_from": str(start)}


def one_document_a_window(config: RunConfig, asked: Mapping[str, Any]) -> RunConfig:
    """The configuration with windows of one document and its end, where a modality makes all of one size.

    It is left as it is where `asked`, what was put over the preset, has no modality (then the preset chose its windows
    for its own) or has a window; and where one document is more than four times a step of the preset, so that it is
    read in several windows. A step keeps as many bytes as it had, or one document, unless `asked` has a batch.
    """
    train, said = config.train, asked.get("train", {})
    size = config.modality.build().size if config.modality is not None and "modality" in asked else None
    if size is None or "context_length" in said or size + 1 > LONGEST_STEP * train.context_length * train.batch:
        return config
    batch = train.batch if "batch" in said else max(1, round(train.context_length * train.batch / (size + 1)))
    return replace(config, train=replace(train, context_length=size + 1, batch=batch))


def describe(name: str) -> dict[str, Any]:
    """A preset in a line: its parts and actual parameter counts, of the model built on the meta device."""
    config = build(RunConfig, merge({"train": {"minutes": DEFAULT_MINUTES}}, preset(name)), f"preset {name}")
    recipe = config.recipe
    model = recipe.build_for_counting()
    entropy_model = 0 if model.patcher is None else sum(p.numel() for p in model.patcher.parameters())
    tables = sum(table.weight.numel() for table in model.lookup_tables())
    own = sum(p.numel() for p in model.parameters()) - entropy_model
    otherwise = "×".join(map(str, model.patch_sizes)) or ("none" if model.target_patch is None else "learned")
    parts = to_mapping(recipe)
    window = config.train.context_length
    mean = usual_mean(recipe)
    ids = mean if model.tokens is not None else 1.0  # bytes of one
    flops = model.flops(window, round(window / mean)) / window / ids
    return {
        "preset": name,
        "model": parts["model"]["name"],
        "patching": parts["patching"]["name"] if model.patcher else otherwise,
        "nominal": nominal_size(name) or "",
        "parameters": own,
        "ngram_tables": tables,
        "entropy_model": entropy_model,
        "context_length": window,
        "flops_per_byte": flops,
        "memory": predict(model, config.train, mean).peak,
    }


SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    **{name: (name, str) for name in ("preset", "model", "patching", "nominal")},
    **{name: (name.replace("_", " "), show_count) for name in ("parameters", "ngram_tables", "entropy_model")},
    "context_length": ("context length", str),
    "flops_per_byte": ("FLOPs/byte", show_count),
    "memory": ("memory", show_bytes),
    "seconds_per_megabyte": ("time/MB", show_seconds),
}


def table(presets: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What `describe` found of presets as a table to be read: its header, and a row for each."""
    columns = {key: column for key, column in SHOWN.items() if key in presets[0]}
    rows = [[show(row[key]) if row[key] != 0 else "none" for key, (_, show) in columns.items()] for row in presets]
    return [title for title, _ in columns.values()], rows
