"""The data of a run's report, read from its files, without loading a model."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from bytelm.checkpoint import store
from bytelm.checkpoint.budget import Budget
from bytelm.checkpoint.metrics import METRICS, read_history
from bytelm.config import Chosen, build, load_toml
from bytelm.data.corpora import open_corpus
from bytelm.data.corpus import SPLITS, Corpus
from bytelm.data.modalities.base import Modality, unit_of
from bytelm.machine import processor
from bytelm.report.artifacts import Inspection, read_evaluation, read_inspection
from bytelm.report.media import Media
from bytelm.report.page import Files, FileType, HeldOut, ReportData
from bytelm.report.recorded import Metrics, last_session, of_kind
from bytelm.units import show_bytes, show_count, show_seconds


def gather(run: str | Path, inspection: Inspection | None = None) -> ReportData:
    """The report of a run, finished or not, from its files and its `inspection` (default: read from the run).

    Without inspection files (older versions, interrupted runs) some panels are missing; `bytelm report` makes the files
    first. Raises CheckpointError for a run without a checkpoint.
    """
    run = Path(run)
    state = store.newest_state(run)[1]
    found = read_inspection(run) if inspection is None else inspection
    corpus, modality = open_corpus(run / "data"), modality_of(state)
    reached = (state[key] for key in ("step", "bytes", "seconds"))
    used = Budget.of(load_toml(run / "config.toml")["train"]).fraction(*reached)
    metrics, evaluation = read_history(run / METRICS), read_evaluation(run)
    lengths = sum((Counter(counts) for counts in found.lengths.values()), Counter[int]())
    return ReportData(
        title=run.resolve().name,
        subtitle=found.description or state["recipe"]["model"]["name"].replace("_", " "),
        state="finished" if used >= 1 else f"unfinished: {used:.0%} of its budget",
        finished=used >= 1,
        key_figures=key_figures(state, found, corpus, lengths),
        segmentation=found.segmentation,
        split=found.split,
        files=files(corpus),
        command=command(run, metrics),
        metrics=metrics,
        patch_lengths=dict(lengths),
        views=[(f"From the {found.split} split", view) for view in found.passages],
        samples=found.samples,
        compressors=evaluation.get("compressors", {}),
        held_out=held_out(evaluation, found, state["step"]),
        config_toml=(run / "config.toml").read_text(encoding="utf-8"),
        facts=facts(run, state, found, metrics),
        media=None if modality is None or modality.text else media(modality, found),
        unit=unit_of(modality),
    )


@dataclass(frozen=True)
class _Bytes:
    """The part of a recipe with the modality."""

    modality: Annotated[Any, Chosen("data.modalities")] | None = None


def modality_of(state: Mapping[str, Any]) -> Modality | None:
    """The modality of a run; None for raw bytes."""
    recipe = {key: value for key, value in state["recipe"].items() if key == "modality"}
    config = build(_Bytes, recipe, store.STATE).modality
    return None if config is None else config.build()


def media(modality: Modality, found: Inspection) -> Media:
    """Completions and unconditional samples of pictures or sound."""
    words = found.note or ("Sampled at temperature 1." if found.free else "")
    return Media(modality, found.completions, found.free, found.split, words)


def held_out(evaluation: Mapping[str, Any], found: Inspection, step: int) -> HeldOut | None:
    """The evaluation for the page; that of an older version has no split, step and planes."""
    if not evaluation:
        return None
    by_type = [
        FileType(f["name"], f["bytes"], f["bits_per_byte"], mean_length(found.lengths.get(f["name"])))
        for f in evaluation["files"]
    ]
    at = evaluation.get("step", step)
    return HeldOut(
        evaluation["bits_per_byte"],
        evaluation["bytes"],
        evaluation["low"],
        evaluation["high"],
        by_type,
        evaluation.get("planes", {}),
        evaluation.get("split", found.split or "held-out"),
        "" if at == step else f", at step {at:,} of {step:,}: `bytelm eval` evaluates the newest",
    )


def mean_length(lengths: Mapping[int, int] | None) -> float | None:
    """Mean patch length; None without patches."""
    return sum(size * count for size, count in lengths.items()) / sum(lengths.values()) if lengths else None


def key_figures(
    state: Mapping[str, Any], found: Inspection, corpus: Corpus, lengths: Counter[int]
) -> list[tuple[str, str]]:
    """The key figures, each with its description."""
    tables = f", {show_count(found.ngram_parameters)} in n-gram tables" if found.ngram_parameters else ""
    epochs, speed = state["bytes"] / corpus.bytes("train"), show_bytes(state["bytes"] / max(1e-9, state["seconds"]))
    shown = [
        (show_bytes(state["bytes"]), f"processed, {epochs:.2g} epochs of the training split"),
        (show_seconds(state["seconds"]), f"training time, {speed}/s"),
        (f"{state['step']:,}", f"steps, {state['skipped']:,} skipped"),
    ]
    if found.parameters:
        shown.insert(0, (show_count(found.parameters), f"parameters{tables}"))
    if mean := mean_length(lengths):
        shown.append((f"{mean:.2f} B", f"mean patch length, {found.split} split"))
    return shown


def files(corpus: Corpus) -> Files:
    """The corpus by file type, and skipped files."""
    rows: dict[str, list[int]] = {}
    for number, split in enumerate(SPLITS):
        table = corpus.documents(split)
        for suffix in np.unique(table.suffixes).tolist():
            own = table.sizes[table.suffixes == suffix]
            row = rows.setdefault(table.suffix_names[suffix] or "no suffix", [0, 0, 0, 0])
            row[0] += len(own)
            row[1 + number] += int(own.sum())
    report = corpus.source_report
    notes = [f"{report.files:,} files read"]
    lost = {"empty": report.empty, "damaged": report.bad, **report.converted}
    notes += [f"{count:,} {what}" for what, count in lost.items() if count]
    return Files(list(rows.items()), report.skipped, [*notes, *filter(None, [corpus.index.warning()])])


def command(run: Path, metrics: Metrics) -> str:
    """The command that resumes the training; empty for runs that did not record their inputs."""
    paths = last_session(metrics).get("paths")
    if not isinstance(paths, list):
        return ""
    return shlex.join(["bytelm", "train", *map(str, paths), "--config", str(run / "config.toml"), "--run", str(run)])


def facts(run: Path, state: Mapping[str, Any], found: Inspection, metrics: Metrics) -> dict[str, str]:
    """Configuration and environment, to reproduce the run."""
    session = last_session(metrics)
    unit = "" if not found.description else " tokens" if found.segmentation == "tokens" else " bytes"
    recorded = [f"{name} {session[name]}" for name in ("bytelm", "python", "torch") if name in session]
    return {
        "run": str(run),
        "machine": f"{processor()}, {session.get('device', 'cpu')}",
        "threads": str(state["threads"]),
        "precision": state["precision"].removeprefix("torch."),
        "versions": ", ".join(recorded or [f"torch {state['torch']}"]),
        "sessions": str(1 + len(of_kind(metrics, "resumed"))),
        "context length": f"{state['context']:,}{unit}",
    }
