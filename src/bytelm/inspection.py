"""Inspection of a trained model for its report: its size, its patches, its samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Loaded, load_patches
from bytelm.checkpoint.packed import Watch
from bytelm.config import load_toml
from bytelm.data.corpora import open_corpus
from bytelm.data.corpus import Split
from bytelm.data.selection import sample_evenly
from bytelm.errors import ResourceError, UsageError
from bytelm.evaluate.patches import lengths_by_kind, opens_of, patch_view, segmenter
from bytelm.find import find, names
from bytelm.generate.document import Task, completion, continuation
from bytelm.generate.prompts import generate, pieces
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.model import ByteModel
from bytelm.patching.entropy import Entropy
from bytelm.report.artifacts import Inspection, keep_inspection, read_inspection
from bytelm.report.media import Completion
from bytelm.report.page import Sample
from bytelm.report.patches import PatchView
from bytelm.transfer import HOST
from bytelm.units import show_bytes

SHOWN = 400  # bytes of a held-out document shown with patches
COUNTED = 1 << 17  # held-out bytes for patch lengths
PROMPTS = 3
EXAMPLES = {".png": 4, ".wav": 2}  # completions, and as many unconditional samples
LONGEST = 1 << 14  # bytes: larger pictures are not sampled, clips are cut (0.5 s at 16 kHz)


def inspect(run: Path, loaded: Loaded, watch: Watch | None = None) -> Inspection:
    """Count parameters and patch lengths, and generate samples. `watch` makes a callback for progress."""
    model, modality = loaded.model, loaded.modality
    corpus = open_corpus(run / "data")
    split: Split = next(s for s in ("test", "valid", "train") if corpus.bytes(s))
    documents = sample_evenly(corpus, split, COUNTED)
    patcher, segmentation = segmenter(model), segmentation_of(model, loaded.state["recipe"])
    count = load_toml(run / "config.toml")["train"]["sample_bytes"]
    readable = modality is None or modality.text
    shown = [data[:SHOWN].tobytes() for _, data in documents[:PROMPTS]] if readable else []
    lengths = lengths_by_kind(patcher, documents) if patcher is not None else {}
    return Inspection(
        step=loaded.state["step"],
        split=split,
        description=description(model, loaded.state["recipe"]),
        segmentation=segmentation,
        parameters=trained(model),
        ngram_parameters=sum(table.weight.numel() for table in model.lookup_tables()),
        lengths={kind: dict(counts) for kind, counts in lengths.items()},
        passages=[view(model, data) for data in shown[:2] if segmentation],
        samples=samples(model, shown, count),
        **({} if readable or not count else media(loaded, documents, watch)),
    )


def inspected(run: Path, loaded: Callable[[], Loaded], watch: Watch | None = None) -> Inspection:
    """The inspection of a run's newest checkpoint: stored in the run, or made (then `loaded` is called) and stored."""
    kept = read_inspection(run)
    if kept.step == store.newest_state(run)[1]["step"]:
        return kept
    found = inspect(run, loaded(), watch)
    with contextlib.suppress(ResourceError):
        keep_inspection(run, found)
    return found


def trained(part: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


def segmentation_of(model: ByteModel, recipe: Mapping[str, Any]) -> str:
    """The patching scheme, "tokens", "learned", or "" for a model over bytes."""
    if model.tokens is not None:
        return "tokens"
    if model.target_patch is not None:
        return "learned"
    return recipe["patching"]["name"] if model.patcher is not None else ""


def description(model: ByteModel, recipe: Mapping[str, Any]) -> str:
    """A one-line description of the model."""
    name, segmentation = recipe["model"]["name"].replace("_", " "), segmentation_of(model, recipe)
    if segmentation == "tokens":
        return f"{name} over {model.vocabulary:,} tokens"
    if segmentation:
        return f"{name} over {segmentation} patches"
    size = model.patch_size
    return f"{name} over patches of {size} bytes" if size else name


def view(model: ByteModel, data: bytes) -> PatchView:
    """The patches of a model in `data`. Raises UsageError for a model without patches."""
    found = patch_view(model, data)
    patcher = model.patcher
    threshold = patcher.config.threshold if isinstance(patcher, Entropy) else None
    entropies = None if found.entropies is None else [float(e) for e in found.entropies]
    return PatchView(data, [bool(o) for o in found.opens], entropies, threshold)


def view_of(source: str, data: bytes, device: torch.device = HOST) -> PatchView:
    """The patches in `data` of a run, or of a scheme without an entropy model, such as space or fixed:8.

    Raises UsageError for a scheme that needs an entropy model, CheckpointError if `source` is neither.
    """
    name, _, size = source.partition(":")
    if Path(source).is_dir() or name not in names("patching"):
        return view(load_patches(source, device), data)
    config = find("patching", name).Config
    if config.uses_entropy_model:
        raise UsageError(f"patches by {name} need an entropy model: name a run that has one, or one of fixed, space")
    if size and not (name == "fixed" and size.isdecimal()):
        raise UsageError(f"{source}: only fixed takes a size, an integer, as in fixed:8")
    patcher = (config(size=int(size)) if size else config()).build()
    opens = np.concatenate([np.zeros(0, bool), *opens_of(patcher, data)])
    return PatchView(data, [bool(o) for o in opens], None, None)


def samples(model: ByteModel, shown: list[bytes], count: int) -> list[Sample]:
    """Continuations of the beginnings of documents, at most `count` bytes each."""
    prompts = [data[: min(64, max(1, len(data) // 2))] for data in shown]
    generated = generate(model, prompts, max_bytes=count) if prompts and count else []
    return [Sample(None, g.prompt, g.data) for g in generated]


def media(loaded: Loaded, documents: Sequence[tuple[str, NDArray[np.uint8]]], watch: Watch | None) -> dict[str, Any]:
    """Completions of the first halves of documents, and unconditional samples: fields of `Inspection`."""
    modality = loaded.modality
    assert modality is not None
    size, count = modality.size, EXAMPLES.get(modality.suffix, 0)
    if size is not None and size > LONGEST:
        way = f"`bytelm generate RUN --out FILE{modality.suffix}` makes one."
        return {"note": f"Not sampled, as {show_bytes(size)} per document would take long: {way}"}
    if not count:
        return {}
    clips = [data[: LONGEST // modality.unit * modality.unit].tobytes() for _, data in documents]
    originals = [clip for clip in clips if len(clip) == (size or len(clip))][:count]
    tasks = [completion(modality, clip) for clip in originals]
    usual = max((task.max_bytes for task in tasks), default=LONGEST // 2)
    added = generated(loaded.model, [*tasks, *[continuation(modality, b"", size=usual)] * count], watch)
    done = [Completion(clip, len(task.prompt), more) for clip, task, more in zip(originals, tasks, added, strict=False)]
    return {"completions": done, "free": added[len(done) :]}


def generated(model: ByteModel, tasks: Sequence[Task], watch: Watch | None) -> list[bytes]:
    """The generated bytes after each prompt, in one batch."""
    most = max(task.max_bytes for task in tasks)
    progress = watch("sampling", most * len(tasks)) if watch else None
    prompts, added = [task.prompt for task in tasks], [bytearray() for _ in tasks]
    for piece in pieces(model, prompts, max_bytes=most, sampling=Sampling(temperature=1.0), eos=False):
        added[piece.row] += piece.data
        if progress:
            progress(len(piece.data))
    return [bytes(row[: task.max_bytes]) for row, task in zip(added, tasks, strict=True)]
