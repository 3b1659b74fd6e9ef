"""What a run recorded and what its model does, gathered for the report."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.checkpoint.assemble import Loaded, load
from bytelm.checkpoint.budget import Budget
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.config import load_toml
from bytelm.data.corpus import SPLITS, Corpus, Split
from bytelm.data.files import write_whole
from bytelm.data.selection import spread
from bytelm.errors import CheckpointError, UsageError
from bytelm.evaluate.patches import lengths_by_kind, mean_size, opens_of, patch_view
from bytelm.evaluate.stream import patcher_of
from bytelm.evaluate.verdict import Verdict, unit_of
from bytelm.find import find, names
from bytelm.generate.document import Task, completion, continuation
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import generate, pieces
from bytelm.interfaces.model import ByteModel
from bytelm.machine import processor
from bytelm.patching.entropy import Entropy
from bytelm.report.media import Completion, Media
from bytelm.report.page import Files, FileType, HeldOut, ReportData, Sample
from bytelm.report.patches import PatchView
from bytelm.report.recorded import Metrics, last_sitting, of_kind
from bytelm.transfer import HOST
from bytelm.units import show_bytes, show_count, show_seconds

VERDICT = "held_out.json"
SHOWN = 400  # bytes of a held-out document that are shown cut into patches
CUT = 1 << 17  # held-out bytes whose patch lengths are counted
PROMPTS = 3
EXAMPLES = {".png": 4, ".wav": 2}  # pictures and clips that are completed, and as many that are made from nothing
LONGEST = 1 << 14  # bytes of a picture that is sampled, and what clips are cut to: half a second of the usual sound
Watch = Callable[[str, int], Callable[[int], None] | None]  # see `cli.common.counter`


def keep_verdict(run: Path, verdict: Verdict) -> None:
    """Write a measurement into the run, for its report."""
    write_whole(run / VERDICT, (json.dumps(verdict.mapping(), indent=1) + "\n").encode())


def gather(run: str | Path, watch: Watch | None = None, device: torch.device = HOST) -> ReportData:
    """Everything for the report of a run, finished or not. Raises CheckpointError for a run without a checkpoint.

    Pictures and sound take a while to sample; `watch` makes what is told of the progress.
    """
    run = Path(run)
    loaded = load(run, device)
    modality = loaded.modality
    corpus = Corpus.open(run / "data")
    split: Split = next(s for s in ("test", "valid", "train") if corpus.bytes(s))
    documents = spread(corpus, split, CUT)
    patcher = patcher_of(loaded.model)
    cuts = patcher is not None or loaded.model.tokens is not None
    kinds = lengths_by_kind(patcher, documents) if patcher is not None else {}
    lengths = sum(kinds.values(), Counter[int]())
    train = load_toml(run / "config.toml")["train"]
    reached = (loaded.state[key] for key in ("step", "bytes", "seconds"))
    sample_bytes, used = train["sample_bytes"], Budget.of(train).fraction(*reached)
    metrics = read_metrics(run / METRICS)
    readable = modality is None or modality.text
    shown = [data[:SHOWN].tobytes() for _, data in documents[:PROMPTS] if readable]
    return ReportData(
        title=run.resolve().name,
        subtitle=subtitle(loaded),
        state=state_of(used),
        finished=used >= 1,
        key_figures=key_figures(loaded, corpus, lengths),
        cutting=cutting_of(loaded),
        split=split,
        files=files(corpus),
        command=command(run, metrics),
        metrics=metrics,
        patch_lengths=dict(lengths),
        views=[(f"from the {split} documents", view(loaded.model, data)) for data in shown[:2] if cuts],
        samples=samples(loaded, shown, sample_bytes),
        compressors=(verdict := read_verdict(run)).get("compressors", {}),
        held_out=shown_verdict(verdict, kinds),
        config_toml=(run / "config.toml").read_text(encoding="utf-8"),
        facts=facts(run, loaded, metrics),
        media=media(loaded, split, documents if sample_bytes else [], watch),
        unit=unit_of(modality),
    )


def view(model: ByteModel, data: bytes) -> PatchView:
    """How a model cuts `data`, as the picture wants it. Raises UsageError for a model without patches."""
    found = patch_view(model, data)
    patcher = patcher_of(model)
    threshold = patcher.config.threshold if isinstance(patcher, Entropy) else None
    entropies = None if found.entropies is None else [float(e) for e in found.entropies]
    return PatchView(data, [bool(o) for o in found.opens], entropies, threshold)


def view_of(source: str, data: bytes, device: torch.device = HOST) -> PatchView:
    """How a run cuts `data`, or a scheme that needs no scorer: its name, and a size for fixed, as in fixed:8.

    Raises UsageError for a scheme that asks a scorer, CheckpointError for what is neither.
    """
    name, _, size = source.partition(":")
    if Path(source).is_dir() or name not in names("patching"):
        return view(load(source, device).model, data)
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


def media(
    loaded: Loaded, split: Split, documents: Sequence[tuple[str, NDArray[np.uint8]]], watch: Watch | None
) -> Media | None:
    """What the model makes of the first halves of documents of a split, and of nothing; None where they are text."""
    modality = loaded.modality
    if modality is None or modality.text:
        return None
    size, count = modality.size, EXAMPLES.get(modality.suffix, 0)
    if size is not None and size > LONGEST:
        way = f"`bytelm generate RUN --out FILE{modality.suffix}` makes one."
        return Media(modality, note=f"Not sampled here, as {show_bytes(size)} a document would take long: {way}")
    if not documents or not count:
        return Media(modality)
    clips = [data[: LONGEST // modality.unit * modality.unit].tobytes() for _, data in documents]
    originals = [clip for clip in clips if len(clip) == (size or len(clip))][:count]
    tasks = [completion(modality, clip) for clip in originals]
    usual = max((task.max_bytes for task in tasks), default=LONGEST // 2)
    added = written(loaded.model, [*tasks, *[continuation(modality, b"", size=usual)] * count], watch)
    done = [Completion(clip, len(task.prompt), more) for clip, task, more in zip(originals, tasks, added, strict=False)]
    return Media(modality, done, added[len(done) :], split, "Sampled at temperature 1.")


def written(model: ByteModel, tasks: Sequence[Task], watch: Watch | None) -> list[bytes]:
    """What the model adds to each prompt, all of them in one batch."""
    most = max(task.max_bytes for task in tasks)
    progress = watch("sampling", most * len(tasks)) if watch else None
    prompts, added = [task.prompt for task in tasks], [bytearray() for _ in tasks]
    for piece in pieces(model, prompts, max_bytes=most, sampling=Sampling(temperature=1.0), eos=False):
        added[piece.row] += piece.data
        if progress:
            progress(len(piece.data))
    return [bytes(row[: task.max_bytes]) for row, task in zip(added, tasks, strict=True)]


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
    planes = verdict.get("planes", {})  # older runs have none
    return HeldOut(verdict["bits_per_byte"], verdict["bytes"], verdict["low"], verdict["high"], by_type, planes)


def patches_of(lengths: Counter[int] | None, bytes: int) -> int | None:
    """Patches that so many bytes are cut into at the mean size of those counted."""
    if not lengths:
        return None
    counted = sum(size * count for size, count in lengths.items())
    return max(1, round(bytes * lengths.total() / counted))


def state_of(used: float) -> str:
    """How far a run is."""
    return "finished" if used >= 1 else f"unfinished: {used:.0%} of its budget"


def cutting_of(loaded: Loaded) -> str:
    """What cuts documents for the model: a patching scheme, "tokens", or nothing."""
    if loaded.model.tokens is not None:
        return "tokens"
    return loaded.state["recipe"]["patching"]["name"] if patcher_of(loaded.model) is not None else ""


def subtitle(loaded: Loaded) -> str:
    """What the model is, in a line."""
    model, cutting = loaded.state["recipe"]["model"]["name"].replace("_", " "), cutting_of(loaded)
    size = getattr(loaded.model, "patch", None)
    if cutting == "tokens":
        return f"{model} over {loaded.model.vocabulary:,} tokens"
    if cutting:
        return f"{model} over {cutting} patches"
    return f"{model} over patches of {size} bytes" if isinstance(size, int) else model


def key_figures(loaded: Loaded, corpus: Corpus, lengths: Counter[int]) -> list[tuple[str, str]]:
    """The first figures that a reader asks for, each with what it counts."""
    state, model = loaded.state, loaded.model
    own = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    tables = sum(count for name, count in own.items() if "ngram" in name)
    speed = show_bytes(state["bytes"] / max(1e-9, state["seconds"]))
    found = [
        (show_count(sum(own.values())), "parameters" + (f", {show_count(tables)} in n-gram tables" if tables else "")),
        (show_bytes(state["bytes"]), f"seen, {state['bytes'] / corpus.bytes('train'):.2g} times the training files"),
        (show_seconds(state["seconds"]), f"in steps, {speed} a second"),
        (f"{state['step']:,}", f"steps, {state['skipped']:,} skipped"),
    ]
    if lengths:
        found.append((f"{mean_size(lengths):.2f}", "bytes in a patch, held out"))
    return found


def files(corpus: Corpus) -> Files:
    """What the corpus was made of, by type, and what was left out."""
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
    """What goes on with the training, from where it was begun; empty for runs that did not record what they read."""
    paths = last_sitting(metrics).get("paths")
    if not isinstance(paths, list):
        return ""
    return shlex.join(["bytelm", "train", *map(str, paths), "--config", str(run / "config.toml"), "--run", str(run)])


def facts(run: Path, loaded: Loaded, metrics: Metrics) -> dict[str, str]:
    """What a reader asks about a run, and would need to run it again."""
    state, sitting = loaded.state, last_sitting(metrics)
    recorded = [f"{name} {sitting[name]}" for name in ("bytelm", "python", "torch") if name in sitting]
    return {
        "run": str(run),
        "machine": f"{processor()}, {sitting.get('device', 'cpu')}",
        "threads": str(state["threads"]),
        "precision": state["precision"].removeprefix("torch."),
        "versions": ", ".join(recorded or [f"torch {state['torch']}"]),
        "sittings": str(1 + len(of_kind(metrics, "resumed"))),
        "window": f"{state['context']:,} {'tokens' if loaded.model.tokens is not None else 'bytes'}",
    }
