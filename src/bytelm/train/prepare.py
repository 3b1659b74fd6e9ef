"""From raw files to windows with recorded boundaries: each stage leaves its result in the run, and is not done twice.

run/data/          packed shards, and the boundaries beside them
run/scorer/        the scorer's own run, with its checkpoints
run/recipe.toml    what the model is made of, thresholds calibrated
run/merges.npy     what tokens are made of, for a model that reads tokens; the tokens themselves lie beside the shards
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe, restore, trained
from bytelm.checkpoint.metrics import METRICS
from bytelm.config import build, dump_toml, load_toml, to_mapping
from bytelm.data import packed
from bytelm.data.boundaries import Boundaries, BoundaryWriter
from bytelm.data.bpe import LEARNT, Bpe
from bytelm.data.corpus import INDEX, SPLITS, Corpus, iterate_documents
from bytelm.data.files import write_whole
from bytelm.data.modalities.base import Modality
from bytelm.data.pack import pack as pack_files
from bytelm.data.sampler import Sampler
from bytelm.data.selection import spread
from bytelm.data.sources import fingerprint
from bytelm.data.tokens import Source, encoded
from bytelm.device import fitting
from bytelm.errors import DataError
from bytelm.evaluate.calibrate import calibrate
from bytelm.evaluate.stream import chunks, device_of, extended, patcher_of
from bytelm.interfaces.model import ByteModel
from bytelm.models.ngram.entropy_model import NgramScorer
from bytelm.models.transformer.entropy_model import TransformerScorer
from bytelm.models.transformer.model import ByteTransformer
from bytelm.patching import entropy
from bytelm.patching.base import Patcher
from bytelm.patching.entropy import Scorer
from bytelm.train.config import RunConfig
from bytelm.train.journal import Journal
from bytelm.train.loop import Trainer
from bytelm.train.stop import Interrupted, StopRequest
from bytelm.train.team import ALONE, Team
from bytelm.units import PAD, VOCAB, show_bytes

MERGES = "merges.npy"
SAMPLE = 1 << 20  # bytes that thresholds are calibrated on
COUNTED = 1 << 25  # bytes that an n-gram scorer counts at the most
AREA = 1 << 16  # ids, padding included, that are cut at once
AREA_ON_DEVICE = 1 << 18  # and on a GPU, where so many take longer than launching what works on them


def pack_data(
    paths: Sequence[str | Path], config: RunConfig, run: Path, journal: Journal, exclude: Sequence[Path] = ()
) -> Corpus:
    """The run's corpus: packed now, or found packed from the very same files. Raises DataError if they have changed.

    Where the only path is a packed corpus, it is taken over. Raises ConfigError if it was packed in another way.

    The run itself is never read as a source, and neither are the folders `exclude`.
    """
    directory, exclude = run / "data", (run, *exclude)
    pack = packed.pack_of(paths, run)
    if (directory / INDEX).exists():
        corpus = Corpus.open(directory)
        now = fingerprint(paths, exclude) if pack is None else packed.fingerprint(Corpus.open(pack))
        if corpus.source_fingerprint != now:
            raise DataError(
                f"the data of {run} has changed since it was packed: give the files as they were, or start another run"
            )
        return corpus

    def progress(bytes: int) -> None:
        StopRequest.check()
        journal.progress(f"packing: {show_bytes(bytes)}")

    modality = modality_of(config)
    if pack is not None:
        packed.check_options(Corpus.open(pack), config.data, modality and modality.table)
        corpus = packed.take_over(pack, directory)
    else:
        options = asdict(config.data)
        corpus = pack_files(paths, directory, modality=modality, exclude=exclude, progress=progress, **options)
    journal.say(f"data: {told(corpus)}")
    if warning := corpus.index.warning():
        journal.say(f"data: {warning}")
    return corpus


def modality_of(config: RunConfig) -> Modality | None:
    """What the bytes of the run stand for; None where they are those of files."""
    return None if config.modality is None else config.modality.build()


def told(corpus: Corpus) -> str:
    """A corpus in a line: the files, what was skipped and converted, and the splits."""
    report = corpus.source_report
    parts = [f"{report.files} files", *report.losses(), show_bytes(corpus.total)]
    splits = [f"{show_bytes(corpus.bytes(split))} {split}" for split in SPLITS]
    return f"{', '.join(parts)}: {', '.join(splits)}"


def prepare_scorer(
    config: RunConfig, corpus: Corpus, run: Path, journal: Journal, device: torch.device, team: Team
) -> TransformerScorer | NgramScorer:
    """The scorer, counted or trained on the training documents. Raises Interrupted where a signal ends its training."""
    assert config.scorer is not None
    scorer: TransformerScorer | NgramScorer = config.scorer.build()
    home = run / "scorer"
    home.mkdir(exist_ok=True)
    if isinstance(scorer, NgramScorer):
        if store.checkpoints(home):
            scorer.load_state_dict(store.read_tensors(store.newest(home), "model"))
            return scorer
        journal.progress("scorer: counting n-grams", force=True)
        scorer.count([data for _, data in spread(corpus, "train", COUNTED)])
        StopRequest.check()
        store.save(home, 1, {"model": scorer.state_dict()}, {})
        return scorer
    scorer.model.initialise(config.train.seed)
    scorer.to(device)
    train = config.scorer_train
    aligned = is_aligned(config)
    sampler = Sampler(corpus, "train", train.window, train.batch, train.seed, aligned=aligned)
    own = Journal(home / METRICS, journal.quiet, journal.stream, prefix="scorer: ", mute=journal.mute)
    valid = held_out(corpus, train.window, None, aligned)
    trainer = Trainer(scorer.model, train, sampler, home, own, valid=valid, team=team.alone())
    with fitting(
        device, "a step of the scorer", lambda: f"--set scorer_train.batch={max(1, train.batch // 2)} halves it"
    ):
        outcome = trainer.fit()
    if outcome.signal is not None:
        raise Interrupted(outcome.signal)
    return scorer


def prepare_recipe(config: RunConfig, scorer: Scorer | None, corpus: Corpus, run: Path, journal: Journal) -> Recipe:
    """The recipe with the thresholds that give patches of the wanted mean size, calibrated once and kept."""
    path = run / "recipe.toml"
    if path.exists():
        return build(Recipe, load_toml(path), str(path))
    recipe = config.recipe
    if scorer is not None and isinstance(recipe.patching, entropy.Config) and not recipe.patching.calibrated:

        def progress(bytes: int) -> None:
            StopRequest.check()

        journal.progress(f"calibrating for patches of {recipe.patching.mean_size} bytes", force=True)
        sample = [data for _, data in spread(corpus, "train", SAMPLE)]
        recipe = replace(recipe, patching=calibrate(recipe.patching, scorer, sample, progress))
    write_whole(path, dump_toml(to_mapping(recipe)).encode())
    return recipe


def prepare_tokens(model: ByteModel, corpus: Corpus, run: Path, journal: Journal) -> Source:
    """The corpus in what the model reads: as it is, or in tokens, learnt from the training documents and kept."""
    if not isinstance(model, ByteTransformer) or model.tokens is None:
        return corpus
    path = run / MERGES
    if not path.exists():
        journal.progress("tokens: learning what belongs together", force=True)
        keep_merges(run, Bpe.learn((d.tobytes() for _, d in spread(corpus, "train", LEARNT)), model.vocabulary))
    try:
        merges = np.load(path, allow_pickle=False)
        if merges.dtype != np.int64 or merges.shape != (model.vocabulary - VOCAB, 2):
            raise ValueError("it is of another vocabulary")
        model.take_tokens(Bpe(merges))
    except (ValueError, EOFError, DataError) as error:
        raise DataError(f"{path} is damaged ({error}): start another run") from None

    def progress(bytes: int) -> None:
        StopRequest.check()
        journal.progress(f"encoding: {show_bytes(bytes)} of {show_bytes(corpus.total)}")

    source = encoded(corpus, model.tokens, progress)
    mean = corpus.total / source.total
    journal.say(f"tokens: {source.total:,} over {show_bytes(corpus.total)}, {mean:.2f} bytes each")
    return source


def record_boundaries(patcher: Patcher, recipe: Recipe, corpus: Corpus, journal: Journal) -> Boundaries:
    """The boundaries of the whole corpus, decided once; an interrupted recording goes on where it stopped."""
    name = fingerprint_of(patcher, recipe, corpus)
    if (corpus.directory / f"boundaries-{name[:16]}.json").exists():
        return Boundaries.open(corpus.directory, name)
    with BoundaryWriter(corpus.directory, name, corpus.total) as writer:
        for opens in cut(patcher, (d for _, d in iterate_documents(corpus, start=writer.position))):
            writer.write(opens)
            StopRequest.check()
            journal.progress(f"cutting patches: {show_bytes(writer.position)} of {show_bytes(corpus.total)}")
        boundaries = writer.finish()
    mean = corpus.total / max(1, boundaries.patches)
    journal.say(f"patches: {boundaries.patches:,} over {show_bytes(corpus.total)}, {mean:.2f} bytes each")
    return boundaries


def fingerprint_of(patcher: Patcher, recipe: Recipe, corpus: Corpus) -> str:
    """What boundaries depend on: the rule, every weight of the scorer, and the bytes."""
    digest = hashlib.sha256(corpus.fingerprint.encode())
    digest.update(repr(to_mapping(recipe).get("patching")).encode())
    for key, tensor in patcher.state_dict().items():
        digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cut(patcher: Patcher, documents: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.bool_]]:
    """For each document, whether the byte after each of its bytes opens a patch. Short neighbours go side by side."""
    area = AREA if device_of(patcher).type == "cpu" else AREA_ON_DEVICE
    group: list[NDArray[np.uint8]] = []
    for document in itertools.chain(documents, [None]):
        longest = max((len(d) for d in [*group, *([] if document is None else [document])]), default=0)
        if group and (document is None or (len(group) + 1) * (longest + 1) > area):
            yield from cut_group(patcher, group)
            group = []
        if document is not None:
            group.append(document)


def cut_group(patcher: Patcher, group: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.bool_]]:
    """Documents side by side, a chunk at a time."""
    rows = [list(chunks(document)) for document in group]
    state = patcher.begin(len(group))
    found: list[torch.Tensor] = []
    for column in itertools.zip_longest(*rows, fillvalue=torch.zeros(0, dtype=torch.long)):
        StopRequest.check()
        ids = nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=PAD)
        opens, state = extended(patcher, ids, state)
        found.append(opens)
    opens = torch.cat(found, 1).numpy()
    for row, document in zip(opens, group, strict=True):
        yield row[1 : len(document) + 1]


@dataclass(frozen=True)
class Prepared:
    """All that the loop needs."""

    corpus: Corpus
    recipe: Recipe
    model: ByteModel
    sampler: Sampler
    valid: Sampler | None


def is_aligned(config: RunConfig) -> bool:
    """Whether windows start where documents do."""
    modality = modality_of(config)
    return modality is not None and modality.aligned


def held_out(source: Source, window: int, boundaries: Boundaries | None, aligned: bool) -> Sampler | None:
    """Windows of the validation documents, the same at every look; None where there are none."""
    if not len(source.documents("valid")):
        return None
    return Sampler(source, "valid", window, batch=8, seed=0, boundaries=boundaries, aligned=aligned)


def begun(config: RunConfig, recipe: Recipe, run: Path, journal: Journal) -> ByteModel:
    """The model at its beginning: initialised, or with the weights of another run."""
    if config.start is None:
        model = recipe.assemble()
        model.initialise(config.train.seed)
        return model
    going = bool(store.checkpoints(run))
    model = recipe.blank()
    checkpoint = store.newest_good(run)[0] if going else trained(config.start)[0]
    restore(model, checkpoint)
    if not going:
        journal.say(f"starting from {checkpoint}")
    if model.tokens is not None and not (run / MERGES).exists():
        keep_merges(run, model.tokens)
    return model


def keep_merges(run: Path, tokens: Bpe) -> None:
    """Write down what tokens are made of."""
    held = io.BytesIO()
    np.save(held, tokens.merges, allow_pickle=False)
    write_whole(run / MERGES, held.getvalue())


def prepare(
    paths: Sequence[str | Path],
    config: RunConfig,
    run: Path,
    journal: Journal,
    device: torch.device,
    exclude: Sequence[Path] = (),
    team: Team = ALONE,
) -> Prepared:
    """Everything up to the first step. Raises Interrupted, DataError, ConfigError, ResourceError."""
    with journal.phase("packing"):
        corpus = pack_data(paths, config, run, journal, exclude)
    scored = config.recipe.scored and config.start is None
    with journal.phase("scorer") if scored else nullcontext():
        scorer = prepare_scorer(config, corpus, run, journal, device, team) if scored else None
    with journal.phase("calibrating") if scored else nullcontext():
        recipe = prepare_recipe(config, scorer, corpus, run, journal)
    model = begun(config, recipe, run, journal)
    with fitting(device, "the model", lambda: "take a smaller --preset, or --device cpu"):
        model.to(device)
    patcher = patcher_of(model)
    if scorer is not None and isinstance(patcher, entropy.Entropy) and isinstance(patcher.scorer, nn.Module):
        patcher.scorer.load_state_dict(scorer.state_dict())
    with nullcontext() if patcher is None else journal.phase("cutting patches"):
        boundaries = None if patcher is None else record_boundaries(patcher, recipe, corpus, journal)
    with nullcontext() if model.tokens is None else journal.phase("tokens"):
        source = prepare_tokens(model, corpus, run, journal)
    train = config.train
    aligned, place = is_aligned(config), (team.rows(train.batch), train.seed, team.rank, team.world)
    sampler = Sampler(source, "train", train.window, *place, boundaries=boundaries, aligned=aligned)
    return Prepared(corpus, recipe, model, sampler, held_out(source, train.window, boundaries, aligned))
