"""What a run recorded and what its model does, gathered for the report."""

from __future__ import annotations

import itertools
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bytelm.checkpoint.assemble import Loaded, load
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.config import load_toml
from bytelm.data.corpus import Corpus, Split
from bytelm.data.selection import spread
from bytelm.errors import CheckpointError, UsageError
from bytelm.evaluate.patches import lengths_by_kind, opens_of, patch_view
from bytelm.evaluate.stream import patcher_of
from bytelm.evaluate.verdict import Verdict
from bytelm.find import find, names
from bytelm.generate.session import generate
from bytelm.models.base import ByteModel
from bytelm.patching.entropy import Entropy
from bytelm.report.page import FileType, HeldOut, ReportData, Sample
from bytelm.report.patches import PatchView
from bytelm.units import show_count, show_seconds

VERDICT = "held_out.json"
SHOWN = 400  # bytes of a held-out document that are shown cut into patches
CUT = 1 << 17  # held-out bytes whose patch lengths are counted
PROMPTS = 3


def keep_verdict(run: Path, verdict: Verdict) -> None:
    """Write a measurement into the run, for its report."""
    (run / VERDICT).write_text(json.dumps(verdict.mapping(), indent=1) + "\n", encoding="utf-8")


def gather(run: str | Path) -> ReportData:
    """Everything for the report of a run, finished or not. Raises CheckpointError for a run without a checkpoint."""
    run = Path(run)
    loaded = load(run)
    corpus = Corpus.open(run / "data")
    split: Split = next(s for s in ("test", "valid", "train") if corpus.bytes(s))
    documents = spread(corpus, split, CUT)
    patcher = patcher_of(loaded.model)
    kinds = lengths_by_kind(patcher, documents) if patcher is not None else {}
    shown = [data[:SHOWN].tobytes() for _, data in documents[:PROMPTS]]
    return ReportData(
        title=f"{run.resolve().name}: a byte model trained by bytelm",
        metrics=read_metrics(run / METRICS),
        patch_lengths=dict(sum(kinds.values(), Counter[int]())),
        views=[(f"from the {split} documents", view(loaded.model, data)) for data in shown[:2] if patcher is not None],
        samples=samples(loaded, shown, load_toml(run / "config.toml")["train"]["sample_bytes"]),
        compressors=(verdict := read_verdict(run)).get("compressors", {}),
        held_out=shown_verdict(verdict, kinds),
        config_toml=(run / "config.toml").read_text(encoding="utf-8"),
        facts=facts(run, loaded, corpus),
    )


def view(model: ByteModel, data: bytes) -> PatchView:
    """How a model cuts `data`, as the picture wants it. Raises UsageError for a model without patches."""
    found = patch_view(model, data)
    patcher = patcher_of(model)
    threshold = patcher.config.threshold if isinstance(patcher, Entropy) else None
    entropies = None if found.entropies is None else [float(e) for e in found.entropies]
    return PatchView(data, [bool(o) for o in found.opens], entropies, threshold)


def view_of(source: str, data: bytes) -> PatchView:
    """How a run cuts `data`, or a scheme that needs no scorer: its name, and a size for fixed, as in fixed:8.

    Raises UsageError for a scheme that asks a scorer, CheckpointError for what is neither.
    """
    name, _, size = source.partition(":")
    if Path(source).is_dir() or name not in names("patching"):
        return view(load(source).model, data)
    config = find("patching", name).Config
    if config.scored:
        raise UsageError(f"patches by {name} need a scorer: name a run that has one, or one of fixed, space")
    if size and not (name == "fixed" and size.isdecimal()):
        raise UsageError(f"{source}: only fixed takes a size, a whole number, as in fixed:8")
    patcher = (config(size=int(size)) if size else config()).build()
    opens = np.concatenate([np.zeros(0, bool), *opens_of(patcher, data)])
    return PatchView(data, [bool(o) for o in opens], None, None)


def samples(loaded: Loaded, shown: list[bytes], count: int) -> list[Sample]:
    """What the model writes after the beginnings of held-out documents, `count` bytes at the most."""
    prompts = [data[: min(64, max(1, len(data) // 2))] for data in shown]
    written = generate(loaded.model, prompts, max_bytes=count) if prompts and count else []
    return [Sample(None, g.prompt, g.data) for g in written]


def read_verdict(run: Path) -> dict[str, Any]:
    """The measurement kept in the run; empty if there is none."""
    path = run / VERDICT
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): measure again with `bytelm eval {run}`") from None


def shown_verdict(verdict: dict[str, Any], kinds: dict[str, Counter[int]]) -> HeldOut | None:
    """The measurement as the page wants it."""
    if not verdict:
        return None
    by_type = [
        FileType(f["name"], f["bytes"], f["bits_per_byte"], patches_of(kinds.get(f["name"]), f["bytes"]))
        for f in verdict["files"]
    ]
    return HeldOut(verdict["bits_per_byte"], verdict["bytes"], verdict["low"], verdict["high"], by_type)


def patches_of(lengths: Counter[int] | None, bytes: int) -> int | None:
    """Patches that so many bytes are cut into at the mean size of those counted."""
    if not lengths:
        return None
    counted = sum(size * count for size, count in lengths.items())
    return max(1, round(bytes * lengths.total() / counted))


def facts(run: Path, loaded: Loaded, corpus: Corpus) -> dict[str, str]:
    """What a reader asks about a run."""
    state = loaded.state
    trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    tables = sum(p.numel() for name, p in loaded.model.named_parameters() if "ngram" in name)
    found = {
        "model": f"{state['recipe']['model']['name']}, {show_count(trainable)} parameters, "
        f"{show_count(tables)} of them n-gram tables",
        "trained": f"{state['step']:,} steps, {state['bytes']:,} bytes, {show_seconds(state['seconds'])}",
        "steps skipped as not finite": str(state["skipped"]),
        "corpus": ", ".join(f"{corpus.bytes(s):,} bytes {s}" for s in ("train", "valid", "test")),
        "machine": f"{platform.processor() or platform.machine()}, {state['threads']} threads, {state['precision']}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
    }
    return dict(itertools.chain(found.items(), [("run", str(run))]))
