"""The report of a run, finished or not: one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.data.files import write_whole
from bytelm.report.charts import Bar, bar_chart, histogram
from bytelm.report.markup import Figure, Table, rendered
from bytelm.report.media import Media, gallery
from bytelm.report.patches import PatchView, drawable
from bytelm.report.recorded import Metrics, curve
from bytelm.report.sections import lengths_over_training, resources, summary_of_curves, training_curves
from bytelm.units import show_bytes

SAMPLES = 12  # shown, evenly through the training
TYPES = 12  # file types shown; the rest is summed
NAMED = 40  # skipped files that are named
SPLITS = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Sample:
    """A prompt, the bytes generated after it, and the training step (None: after training)."""

    step: int | None
    prompt: bytes
    text: bytes


@dataclass(frozen=True)
class FileType:
    """The evaluated bytes of one file type: their number, bits per byte, mean patch length in bytes."""

    name: str
    bytes: int
    bits_per_byte: float
    patch_length: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """The evaluation on held-out bytes: 95 % interval, bits by plane. `outdated`: its step if not the newest."""

    bits_per_byte: float
    bytes: int
    low: float | None = None
    high: float | None = None
    by_type: Sequence[FileType] = ()
    planes: Mapping[str, float] = field(default_factory=dict[str, float])
    split: str = "test"
    outdated: str = ""


@dataclass(frozen=True)
class Files:
    """A corpus by type: (type, (documents, bytes for training, validation, test)); skipped files: (name, reason)."""

    types: Sequence[tuple[str, Sequence[int]]]
    left_out: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ReportData:
    """All that a report can show; whatever is missing is omitted from the page.

    `metrics`: lines of `read_history`, unknown kinds ignored. `views`: patch views with captions. `compressors`: bits
    per byte of gzip and others on the held-out bytes. `media` replaces all text samples. `unit`: the name of bits per
    byte. `state`: status badge. `key_figures`: (figure, description). `segmentation`: the patching scheme, or "tokens".
    `split`: where patches are counted. `command` resumes the training.
    """

    title: str
    metrics: Metrics = ()
    patch_lengths: Mapping[int, int] = field(default_factory=dict[int, int])
    views: Sequence[tuple[str, PatchView]] = ()
    samples: Sequence[Sample] = ()
    compressors: Mapping[str, float] = field(default_factory=dict[str, float])
    held_out: HeldOut | None = None
    config_toml: str = ""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    media: Media | None = None
    unit: str = "bits per byte"
    subtitle: str = ""
    state: str = ""
    finished: bool = True
    key_figures: Sequence[tuple[str, str]] = ()
    segmentation: str = ""
    split: str = "test"
    files: Files | None = None
    command: str = ""


def render(data: ReportData) -> str:
    """The page. Nothing in `data` can become markup, and the page fetches nothing."""
    bits, words = _headline(data)
    drift = lengths_over_training(data.metrics, data.segmentation)
    return rendered(
        "report.html",
        title=data.title,
        data=data,
        bits=bits,
        headline=words,
        compressors=_compressors(data),
        planes=_planes(data),
        curves=training_curves(data.metrics, data.unit),
        summary=summary_of_curves(data.metrics, data.unit),
        file_types=_file_types(data),
        lengths=[[figure] for figure in (_lengths(data), drift) if figure],
        views=[drawable(view, caption) for caption, view in data.views],
        samples=_samples(data) if data.media is None else None,
        gallery=gallery(data.media) if data.media is not None else "",
        resources=resources(data.metrics),
        files=_files(data.files) if data.files is not None else None,
    )


def write(path: Path, html: str) -> None:
    """Write the page atomically. Raises ResourceError."""
    write_whole(path, html.encode())


def _headline(data: ReportData) -> tuple[str, str]:
    """Bits per byte of the evaluation, else of the last validation, and their description."""
    held = data.held_out
    if held is not None:
        interval = "" if held.low is None or held.high is None else f", 95 % CI {held.low:.3f} to {held.high:.3f}"
        words = f"on {show_bytes(held.bytes)} of the {SPLITS.get(held.split, held.split)} split{interval}"
        return f"{held.bits_per_byte:.3f}", words + held.outdated
    for kind, split in (("validation", "validation"), ("train", "training")):
        points = curve(data.metrics, kind, x="step")
        if points:
            step, bits = points[-1]
            return f"{bits:.3f}", f"on the {split} split, at step {step:,.0f}; not yet evaluated on held-out bytes"
    return "", ""


def _compressors(data: ReportData) -> list[Sequence[Figure]]:
    """The model and compressors on the same bytes, as a chart and as a table."""
    held = data.held_out
    if held is None or not data.compressors:
        return []
    bars = [Bar("this model", held.bits_per_byte, held.low, held.high, ours=True)]
    bars += [Bar(name, bits) for name, bits in sorted(data.compressors.items(), key=lambda item: item[1])]
    rows = [
        [bar.name, f"{bar.value:.3f}", f"{bar.value / 8:.1%}", show_bytes(bar.value / 8 * held.bytes)] for bar in bars
    ]
    chart = bar_chart(bars, data.unit, f"{data.unit.capitalize()} of the model and of compressors")
    head = ["compressor", data.unit, "compressed size (% of original)", "compressed size (bytes)"]
    return [[Figure(chart)], [Figure(table=Table(head, rows, ours=0))]]


def _planes(data: ReportData) -> list[Sequence[Figure]]:
    if data.held_out is None or not data.held_out.planes:
        return []
    rows = [[name, f"{bits:.3f}"] for name, bits in data.held_out.planes.items()]
    return [[Figure(table=Table(["plane", data.unit], rows))]]


def _file_types(data: ReportData) -> list[Sequence[Figure]]:
    """Bits per byte of each file type as a table, and as a chart if there are several types."""
    held = data.held_out
    if held is None or not held.by_type:
        return []
    by_type = sorted(held.by_type, key=lambda row: -row.bytes)
    patched = any(row.patch_length for row in by_type)
    head = ["file type", "size (bytes)", data.unit, *(["mean patch length (bytes)"] if patched else [])]
    rows = [
        [
            row.name,
            show_bytes(row.bytes),
            f"{row.bits_per_byte:.3f}",
            f"{row.patch_length:.2f}" if row.patch_length else "–",
        ][: len(head)]
        for row in by_type
    ]
    table = Figure(table=Table(head, rows))
    if len(by_type) == 1:
        return [[table]]
    bars = [Bar(row.name, row.bits_per_byte) for row in sorted(by_type[:TYPES], key=lambda row: row.bits_per_byte)]
    words = "A high value means a type that is rare in the training split, or noise: check the data before the model."
    return [[Figure(bar_chart(bars, data.unit, f"{data.unit.capitalize()} by file type"), words)], [table]]


def _lengths(data: ReportData) -> Figure | None:
    if not data.patch_lengths:
        return None
    chart = histogram(data.patch_lengths, "patch length (bytes)", "patches", "Patch lengths")
    return Figure(chart, f"Patch lengths on the {SPLITS.get(data.split, data.split)} split.")


def _samples(data: ReportData) -> dict[str, Any] | None:
    """The newest samples, and older ones to be folded; None if there are none."""
    through, now = list(dict.fromkeys(_recorded(data.metrics))), list(data.samples)
    if not through and not now:
        return None
    count = min(SAMPLES, len(through))
    picks = [through[round(nth * (len(through) - 1) / max(1, count - 1))] for nth in range(count)]
    some = f"{count - 1} of {len(through) - 1} earlier samples" if count < len(through) else "Earlier samples"
    return {
        "newest": [*now, *picks[-1:]],
        "older": picks[-2::-1],
        "heading": f"{some} after the same prompt",
    }


def _recorded(metrics: Metrics) -> Iterator[Sample]:
    for line in metrics:
        step, prompt, text = line.get("step"), line.get("prompt"), line.get("text")
        if line.get("kind") == "sample" and isinstance(prompt, str) and isinstance(text, str):
            yield Sample(step if isinstance(step, int) else None, _encoded(prompt), _encoded(text))


def _encoded(text: str) -> bytes:
    """The bytes of a recorded string, lone surrogates (valid in JSON) included."""
    return text.encode("utf-8", "surrogatepass")


def _files(files: Files) -> dict[str, Any]:
    """The corpus by file type, and skipped files with reasons."""
    types = sorted(files.types, key=lambda row: -sum(row[1][1:]))
    if len(types) > TYPES:
        rest = [sum(counts) for counts in zip(*(counts for _, counts in types[TYPES:]), strict=True)]
        types = [*types[:TYPES], (f"{len(types) - TYPES} more types", rest)]
    rows = [[name, f"{count:,}", *(show_bytes(n) if n else "–" for n in sizes)] for name, (count, *sizes) in types]
    reasons = Counter(reason for _, reason in files.left_out).most_common()
    skipped = ", ".join(f"{count} ({reason})" for reason, count in reasons)
    more = f" (first {NAMED} of {len(files.left_out)})" if len(files.left_out) > NAMED else ""
    head = ["file type", "documents", *(f"{split} (bytes)" for split in SPLITS.values())]
    return {
        "table": Figure(table=Table(head, rows)),
        "note": "; ".join([*files.notes, f"skipped: {skipped}" if skipped else "no file skipped"]) + ".",
        "skipped": files.left_out[:NAMED],
        "heading": f"Skipped files{more}",
    }
