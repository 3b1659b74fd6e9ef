"""From raw files to windows, and to a model at its beginning: runs the stages of a training in order.

run/data/          packed shards, with patch boundaries or tokens; of a mixture in a folder for each source
run/entropy_model/ the run of the entropy model
run/recipe.toml    the recipe, with calibrated thresholds
run/merges.npy     BPE merges, for a model over tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint import legacy, store
from bytelm.checkpoint.assemble import Recipe, resolve_checkpoint, restore, weights_of
from bytelm.checkpoint.metrics import METRICS
from bytelm.checkpoint.packed import load_patcher
from bytelm.data.boundaries import Boundaries
from bytelm.data.bpe import Bpe
from bytelm.data.corpora import Corpora, parts_of, paths_by_source
from bytelm.data.corpus import Corpus
from bytelm.data.mixture import HeldOut
from bytelm.data.modalities.base import Modality
from bytelm.data.packed import pack_of
from bytelm.data.sampler import Sampler, Windows
from bytelm.data.tokens import Source
from bytelm.device import fitting
from bytelm.interfaces.model import ByteModel
from bytelm.nn.sharded import rows_here
from bytelm.patching.base import Patcher
from bytelm.training.config import RunConfig
from bytelm.training.dist import SINGLE_PROCESS, DistContext
from bytelm.training.journal import Journal
from bytelm.training.loop import precision
from bytelm.training.parallelize import parallelize
from bytelm.training.stages.base import run_stage
from bytelm.training.stages.boundaries import BoundaryStage
from bytelm.training.stages.entropy_model import EntropyModelStage
from bytelm.training.stages.packing import PackingStage
from bytelm.training.stages.thresholds import ThresholdStage, keep_recipe
from bytelm.training.stages.tokens import MERGES, TokenizerStage, TokenStage, keep_merges
from bytelm.training.windows import WindowsOf


@dataclass(frozen=True)
class Prepared:
    """What is there before the model is."""

    corpus: Corpus
    modality: Modality | None
    recipe: Recipe
    patcher: Patcher | None
    """On the model's device."""
    tokens: Bpe | None
    sampler: Windows
    valid: Sampler | HeldOut | None


def prepare(
    paths: Sequence[str | Path],
    config: RunConfig,
    run: Path,
    journal: Journal,
    device: torch.device,
    exclude: Sequence[Path] = (),
    dist: DistContext = SINGLE_PROCESS,
) -> Prepared:
    """Everything up to the model, by all processes together: they share the packing, the boundaries, the tokens.

    Raises Interrupted, DataError, ConfigError, ResourceError.
    """
    train = config.train
    modality = None if config.modality is None else config.modality.build()
    aligned = modality is not None and modality.aligned
    corpus = packed(paths, config, run, journal, modality, exclude, dist)

    def decided() -> tuple[Recipe, Patcher | None, Bpe | None]:
        return what_cuts(config, run, corpus, journal, device, dist, aligned=aligned)

    recipe, patcher, tokens = dist.main_process_first(decided, "patcher")
    parts = parts_of(corpus)
    sources, boundaries = list[Source](parts), list[Boundaries]()
    if patcher is not None:
        with fitting(device, "the patcher", lambda: "take a smaller entropy model, or --device cpu"):
            patcher.to(device)
        boundaries = [run_stage(BoundaryStage(patcher, recipe, part), journal) for part in parts]
    if recipe.build_for_counting().tokens is not None:
        learning = TokenizerStage(run / MERGES, recipe.model.vocabulary, corpus)
        tokens = dist.main_process_first(lambda: run_stage(learning, journal), "tokenizer")
        sources = [run_stage(TokenStage(part, tokens), journal) for part in parts]
    place = (dist.rows(train.batch), train.seed, dist.rank, dist.world)
    windows = WindowsOf(corpus, train.context_length, aligned, sources, boundaries)
    sampler, valid = windows.training(*place), windows.held_out()
    return Prepared(corpus, modality, recipe, patcher, tokens, sampler, valid)


def packed(
    paths: Sequence[str | Path],
    config: RunConfig,
    run: Path,
    journal: Journal,
    modality: Modality | None,
    exclude: Sequence[Path],
    dist: DistContext,
) -> Corpus:
    """The corpus of a run: one, or those of a mixture, each in a folder of its name."""
    several = dist.world > 1
    if not config.mix:
        pack = pack_of(paths, run)
        return run_stage(
            PackingStage(run / "data", paths, config.data, modality, (run, *exclude), pack, join=several), journal
        )
    parts = list[Corpus]()
    for name, own in paths_by_source(paths, config.shares).items():
        folder = run / "data" / name
        pack = pack_of(own, run, name)
        journal.say(f"source: {name}")
        stage = PackingStage(folder, own, config.data, modality, (run, *exclude), pack, join=several)
        parts.append(run_stage(stage, journal))
    return dist.main_process_first(lambda: Corpora.write(run / "data", config.shares, parts), "mixture")


def what_cuts(
    config: RunConfig,
    run: Path,
    corpus: Corpus,
    journal: Journal,
    device: torch.device,
    dist: DistContext,
    *,
    aligned: bool,
) -> tuple[Recipe, Patcher | None, Bpe | None]:
    """The recipe with its thresholds, the patcher, and the tokens of the run that it is fine-tuned from."""
    recipe, entropy_model = config.recipe, None
    if recipe.uses_entropy_model and config.init_from is None:
        home = legacy.entropy_model_home(run)
        words = (config.entropy_model, config.entropy_model_train, config.train.seed, corpus)
        own = journal.beside(home / METRICS, "entropy model: ")
        stage = EntropyModelStage(home, *words, own, aligned=aligned, device=device, dist=dist)
        entropy_model = run_stage(stage, journal)
        recipe = run_stage(ThresholdStage(run / "recipe.toml", recipe, entropy_model, corpus), journal)
    elif not (run / "recipe.toml").exists():
        keep_recipe(run / "recipe.toml", recipe)
    if config.init_from is not None:
        model = recipe.build_on_meta()
        load_patcher(model, beginning(run, config.init_from))
        tokens = model.tokens if isinstance(model.tokens, Bpe) else None
        if tokens is not None and not (run / MERGES).exists():
            keep_merges(run / MERGES, tokens)
        return recipe, model.patcher, tokens
    patcher = recipe.patcher()
    if patcher is not None and entropy_model is not None:
        weights: Any = patcher.get_submodule("entropy_model")
        weights.weights.load_state_dict(entropy_model.weights.state_dict())
    return recipe, patcher, None


def beginning(run: Path, start: str) -> Path:
    """The checkpoint that a fine-tuned model begins from: of the run itself where it has one."""
    return store.newest_good(run)[0] if store.checkpoints(run) else resolve_checkpoint(start)[0]


def begin(
    prepared: Prepared, config: RunConfig, run: Path, journal: Journal, device: torch.device, dist: DistContext
) -> ByteModel:
    """The model at its beginning: initialised around its patcher, or with the weights of another run.

    Several processes each hold their share of it, without values where the run has a checkpoint of its own.
    """
    recipe, train, start = prepared.recipe, config.train, config.init_from
    resumed = bool(store.checkpoints(run))
    if start is not None and not resumed:
        journal.say(f"starting from {beginning(run, start)}")
    empty = start is not None or dist.world > 1
    model = (recipe.build_on_meta if empty else recipe.build)(prepared.patcher)
    for table in model.lookup_tables():
        table.on_host = train.tables == "host"
    with fitting(device, "the model", lambda: "take a smaller --preset, or --device cpu"):
        if dist.world > 1:
            parallelize(model, dist, config.parallel, device, precision(train, device))
            if start is not None and not resumed:
                fill(model, beginning(run, start))
            elif not resumed:
                model.init_weights(train.seed)
        elif start is not None:
            restore(model, beginning(run, start), device)
        else:
            model.init_weights(train.seed)
            model.to(device)
    if prepared.tokens is not None:
        model.take_tokens(prepared.tokens)
    return model


def fill(model: ByteModel, checkpoint: Path) -> None:
    """Copy the weights of a checkpoint into a model of which each process holds a share; no more than one is whole.

    Raises CheckpointError where they do not fit.
    """
    own = model.state_dict()

    def keep(name: str, tensor: Tensor) -> Tensor:
        if name in own and own[name].shape == tensor.shape:
            first, held = rows_here(own[name])
            held.copy_(tensor[first : first + len(held)] if held.ndim else tensor)
        return tensor.to("meta", own[name].dtype if name in own else tensor.dtype)

    store.check_keys(own, weights_of(checkpoint, keep), str(checkpoint))
