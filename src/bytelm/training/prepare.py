"""From raw files to windows: runs the stages of a training in order.

run/data/          packed shards, with patch boundaries or tokens
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

from bytelm.checkpoint import legacy, store
from bytelm.checkpoint.assemble import Recipe, resolve_checkpoint, restore
from bytelm.checkpoint.metrics import METRICS
from bytelm.data.corpus import Corpus
from bytelm.data.modalities.base import Modality
from bytelm.data.packed import pack_of
from bytelm.data.sampler import Sampler, held_out
from bytelm.device import fitting
from bytelm.interfaces.model import ByteModel
from bytelm.training.config import RunConfig
from bytelm.training.dist import SINGLE_PROCESS, DistContext
from bytelm.training.journal import Journal
from bytelm.training.stages.base import run_stage
from bytelm.training.stages.boundaries import BoundaryStage
from bytelm.training.stages.entropy_model import EntropyModelStage, TrainableEntropyModel
from bytelm.training.stages.packing import PackingStage
from bytelm.training.stages.thresholds import ThresholdStage, keep_recipe
from bytelm.training.stages.tokens import MERGES, TokenizerStage, TokenStage, keep_merges


@dataclass(frozen=True)
class Prepared:
    """The inputs of the training loop."""

    corpus: Corpus
    modality: Modality | None
    recipe: Recipe
    model: ByteModel
    sampler: Sampler
    valid: Sampler | None


def prepare(
    paths: Sequence[str | Path],
    config: RunConfig,
    run: Path,
    journal: Journal,
    device: torch.device,
    exclude: Sequence[Path] = (),
    dist: DistContext = SINGLE_PROCESS,
) -> Prepared:
    """Everything up to the first step, by all processes together: they share the packing, the boundaries, the tokens.

    Raises Interrupted, DataError, ConfigError, ResourceError.
    """
    train = config.train
    modality = None if config.modality is None else config.modality.build()
    aligned = modality is not None and modality.aligned
    packed, several = pack_of(paths, run), dist.world > 1
    packing = PackingStage(run / "data", paths, config.data, modality, (run, *exclude), packed, join=several)
    corpus = run_stage(packing, journal)

    def decided() -> tuple[Recipe, ByteModel]:
        own = journal.beside(legacy.entropy_model_home(run) / METRICS, "entropy model: ")
        return built(config, run, corpus, journal, own, device, dist, aligned=aligned)

    recipe, model = dist.main_process_first(decided, "model")
    with fitting(device, "the model", lambda: "take a smaller --preset, or --device cpu"):
        for table in model.lookup_tables():
            table.on_host = train.tables == "host"
        model.to(device)
    source, boundaries = corpus, None
    if (patcher := model.patcher) is not None:
        boundaries = run_stage(BoundaryStage(patcher, recipe, corpus), journal)
    if model.tokens is not None:
        learning = TokenizerStage(run / MERGES, model.vocabulary, corpus)
        model.take_tokens(dist.main_process_first(lambda: run_stage(learning, journal), "tokenizer"))
        source = run_stage(TokenStage(corpus, model.tokens), journal)
    place = (dist.rows(train.batch), train.seed, dist.rank, dist.world)
    sampler = Sampler(source, "train", train.context_length, *place, boundaries=boundaries, aligned=aligned)
    valid = held_out(source, train.context_length, boundaries, aligned)
    return Prepared(corpus, modality, recipe, model, sampler, valid)


def built(
    config: RunConfig,
    run: Path,
    corpus: Corpus,
    journal: Journal,
    own: Journal,
    device: torch.device,
    dist: DistContext,
    *,
    aligned: bool,
) -> tuple[Recipe, ByteModel]:
    """The recipe with its thresholds, and the initial model; `own` is the journal of the entropy model."""
    recipe, seed, entropy_model = config.recipe, config.train.seed, None
    if recipe.uses_entropy_model and config.init_from is None:
        home = legacy.entropy_model_home(run)
        words = (config.entropy_model, config.entropy_model_train, seed, corpus)
        stage = EntropyModelStage(home, *words, own, aligned=aligned, device=device, dist=dist)
        entropy_model = run_stage(stage, journal)
        recipe = run_stage(ThresholdStage(run / "recipe.toml", recipe, entropy_model, corpus), journal)
    elif not (run / "recipe.toml").exists():
        keep_recipe(run / "recipe.toml", recipe)
    return recipe, begun(recipe, seed, run, journal, entropy_model, config.init_from)


def begun(
    recipe: Recipe,
    seed: int,
    run: Path,
    journal: Journal,
    entropy_model: TrainableEntropyModel | None,
    start: str | None,
) -> ByteModel:
    """The initial model: initialised around its entropy model, or with the weights of another run."""
    if start is None:
        model = recipe.build()
        model.init_weights(seed)
        if entropy_model is not None:
            own: Any = model.get_submodule("patcher.entropy_model")
            own.weights.load_state_dict(entropy_model.weights.state_dict())
        return model
    resumed = bool(store.checkpoints(run))
    model = recipe.build_on_meta()
    checkpoint = store.newest_good(run)[0] if resumed else resolve_checkpoint(start)[0]
    restore(model, checkpoint)
    if not resumed:
        journal.say(f"starting from {checkpoint}")
    if model.tokens is not None and not (run / MERGES).exists():
        keep_merges(run / MERGES, model.tokens)
    return model
