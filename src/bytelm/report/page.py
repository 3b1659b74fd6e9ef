"""The report of a run: one self-contained HTML page, made from what was recorded, whether or not the run ended."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bytelm.errors import ResourceError
from bytelm.report.charts import Bar, Series, Show, bar_chart, histogram, line_chart, show_plain
from bytelm.report.glyphs import character, pieces
from bytelm.report.media import Media, gallery
from bytelm.report.patches import PatchView, fragment
from bytelm.report.style import document, escape, table
from bytelm.units import show_bytes

SAMPLES = 8  # shown, evenly through the training
POINTS = 300  # on a line; more are averaged in groups
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}


@dataclass(frozen=True)
class Sample:
    """What was generated after a prompt, and the training step it was generated at (None: not during training)."""

    step: int | None
    prompt: bytes
    text: bytes


@dataclass(frozen=True)
class FileType:
    """The held-out bytes of one type of file: their number, what they cost, the patches they were cut into."""

    name: str
    bytes: int
    bits_per_byte: float
    patches: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """The measurement on bytes kept from training, with its 95 % interval if it has one, and that of each plane."""

    bits_per_byte: float
    bytes: int
    low: float | None = None
    high: float | None = None
    by_type: Sequence[FileType] = ()
    planes: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class ReportData:
    """All that a report can show; whatever is missing is left out of the page.

    `metrics` are the lines of metrics.jsonl (kinds it does not know are ignored); `views` are patch views with their
    captions; `compressors` name the bits per byte of gzip and its like on the held-out bytes. `media` stands in the
    place of all text samples. `unit` is what bits per byte are called.
    """

    title: str
    metrics: Sequence[Mapping[str, object]] = ()
    patch_lengths: Mapping[int, int] = field(default_factory=dict[int, int])
    views: Sequence[tuple[str, PatchView]] = ()
    samples: Sequence[Sample] = ()
    compressors: Mapping[str, float] = field(default_factory=dict[str, float])
    held_out: HeldOut | None = None
    config_toml: str = ""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    media: Media | None = None
    unit: str = "bits per byte"


def render(data: ReportData) -> str:
    """The whole page. Nothing in `data` can become markup, and the page fetches nothing."""
    sections = (
        ("", _headline(data)),
        ("Learning", _curves(data.metrics, data.unit)),
        ("Patches", _patches(data)),
        ("Samples", _samples(data) if data.media is None else gallery(data.media)),
        ("Facts", _facts(data.facts)),
        ("Configuration", _configuration(data.config_toml)),
    )
    parts = [f"<h1>{escape(data.title)}</h1>"]
    for heading, body in sections:
        if body:
            parts.append(f"<section>{f'<h2>{heading}</h2>' if heading else ''}\n{body}\n</section>")
    return document(data.title, "\n".join(parts))


def write(path: Path, html: str) -> None:
    """Put the page in place whole or not at all. Raises ResourceError if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ResourceError(f"cannot write the report {path}: {error.strerror}; choose another place for it") from error


def _headline(data: ReportData) -> str:
    held = data.held_out
    if held is None:
        return _latest(data.metrics, data.unit)
    interval = "" if held.low is None or held.high is None else f", 95 % interval {held.low:.3f} to {held.high:.3f}"
    parts = [
        _figure(held.bits_per_byte, data.unit),
        f"<p>on {show_bytes(held.bytes)} that it was not trained on{interval}</p>",
    ]
    if data.compressors:
        bars = [Bar("this model", held.bits_per_byte, held.low, held.high, ours=True)]
        bars += [Bar(name, bits) for name, bits in sorted(data.compressors.items(), key=lambda item: item[1])]
        rows = [
            [bar.name, f"{bar.value:.3f}", f"{bar.value / 8:.1%}", show_bytes(bar.value / 8 * held.bytes)]
            for bar in bars
        ]
        chart = bar_chart(bars, data.unit, f"{data.unit.capitalize()} of the model and of compressors")
        numbers = table(["", data.unit, "of the size", "bytes"], rows, ours=0)
        note = "All on the same held-out bytes. The model learnt from the training files; its own size is not counted."
        if data.media is not None:
            note += " gzip, bzip2 and xz read all of them in a row; to the other formats each document is a file."
        parts.append(f'<div class="columns"><figure>{chart}</figure><figure>{numbers}</figure></div>')
        parts.append(f'<p class="note">{note}</p>')
    if held.planes:
        planes = table(["plane", data.unit], [[name, f"{bits:.3f}"] for name, bits in held.planes.items()])
        parts.append(f'<div class="columns"><figure>{planes}</figure></div>')
    return "\n".join(parts)


def _latest(metrics: Sequence[Mapping[str, object]], unit: str) -> str:
    """The headline of a run that was not evaluated: the last thing it measured while it trained."""
    for kind, meaning in (("valid", "on the validation bytes"), ("train", "on the training bytes")):
        points = _points(metrics, kind, "step")
        if points:
            step, bits = points[-1]
            return f"{_figure(bits, unit)}\n<p>{meaning}, at step {step:,.0f}; not yet evaluated on held-out bytes</p>"
    return '<p class="note">Nothing has been measured yet.</p>'


def _figure(bits: float, unit: str) -> str:
    return f'<p class="figure">{bits:.3f} <small>{escape(unit)}</small></p>'


def _curves(metrics: Sequence[Mapping[str, object]], y: str) -> str:
    seconds = max((x for kind in ("train", "valid") for x, _ in _points(metrics, kind, "seconds")), default=0.0)
    unit, size = next((unit, size) for unit, size in UNITS.items() if seconds >= 3 * size or size == 1)
    charts = [
        _curve(metrics, "bytes", "bytes seen", 1, show_bytes, y),
        _curve(metrics, "seconds", unit, size, show_plain, y),
    ]
    return f'<div class="columns">{"".join(charts)}</div>' if any(charts) else ""


def _curve(metrics: Sequence[Mapping[str, object]], x: str, label: str, size: int, show: Show, y: str) -> str:
    """Bits a byte (`y`) against `x` in units of `size`, bytes on a logarithmic axis; nothing without points."""
    series = {name: _points(metrics, kind, x) for name, kind in (("training", "train"), ("validation", "valid"))}
    if not any(series.values()):
        return ""
    series = {name: [(at / size, bits) for at, bits in _thinned(points)] for name, points in series.items()}
    title = f"{y.capitalize()} against {label}"
    chart = line_chart(series, label, y, title, log_x=x == "bytes", show_x=show)
    return f"<figure>{chart}</figure>"


def _points(metrics: Sequence[Mapping[str, object]], kind: str, x: str) -> list[tuple[float, float]]:
    """(x, bits per byte) of the lines of one kind. Of a step done again after a resume, the last line counts."""
    found: dict[object, tuple[float, float]] = {}
    for line in metrics:
        at, bits = _number(line.get(x)), _number(line.get("bits_per_byte"))
        if line.get("kind") == kind and at is not None and bits is not None:
            found[line.get("step", at)] = (at, bits)
    return sorted(found.values())


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _thinned(points: Series) -> Series:
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _patches(data: ReportData) -> str:
    overall: list[str] = []
    if data.patch_lengths:
        chart = histogram(data.patch_lengths, "bytes in a patch", "patches", "Lengths of the patches")
        overall.append(f"<figure>{chart}</figure>")
    if data.held_out is not None and data.held_out.by_type:
        overall.append(f"<figure>{_file_types(data.held_out.by_type, data.unit)}</figure>")
    views = [fragment(view, caption) for caption, view in data.views]
    return "\n".join([f'<div class="columns">{"".join(overall)}</div>'] * bool(overall) + views)


def _file_types(by_type: Sequence[FileType], unit: str) -> str:
    rows = [
        [
            row.name,
            show_bytes(row.bytes),
            f"{row.bits_per_byte:.3f}",
            f"{row.bytes / row.patches:.2f}" if row.patches else "–",
        ]
        for row in sorted(by_type, key=lambda row: -row.bytes)
    ]
    return table(["held-out files", "bytes", unit, "bytes per patch"], rows)


def _samples(data: ReportData) -> str:
    every = list(dict.fromkeys([*_recorded(data.metrics), *data.samples]))
    if not every:
        return ""
    count = min(SAMPLES, len(every))
    picks = [every[round(nth * (len(every) - 1) / max(1, count - 1))] for nth in range(count - 1)] + [every[-1]]
    some = f"{count} of {len(every)} samples. " if count < len(every) else ""
    cards = "\n".join(_card(sample) for sample in picks)
    return f'<p class="note">{some}The prompt is <mark>marked</mark>; what follows it, the model wrote.</p>\n{cards}'


def _recorded(metrics: Sequence[Mapping[str, object]]) -> Iterator[Sample]:
    for line in metrics:
        step, prompt, text = line.get("step"), line.get("prompt"), line.get("text")
        if line.get("kind") == "sample" and isinstance(prompt, str) and isinstance(text, str):
            yield Sample(step if isinstance(step, int) else None, _encoded(prompt), _encoded(text))


def _encoded(text: str) -> bytes:
    """The bytes of a recorded string, a lone surrogate (which JSON lets through) included."""
    return text.encode("utf-8", "surrogatepass")


def _card(sample: Sample) -> str:
    when = "" if sample.step is None else f"step {sample.step:,}"
    prompt = f"<mark>{_flowing(sample.prompt)}</mark>" if sample.prompt else ""
    return f'<div class="sample"><span>{when}</span><pre>{prompt}{_flowing(sample.text)}</pre></div>'


def _flowing(data: bytes) -> str:
    """Bytes as running text; those that are no character stand in small boxes."""
    shown = ((character(piece), piece) for piece in pieces(data))
    return "".join(f'<span class="hex">{p.hex().upper()}</span>' if text is None else escape(text) for text, p in shown)


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _configuration(toml: str) -> str:
    return f"<details><summary>config.toml</summary><pre>{escape(toml)}</pre></details>" if toml else ""
