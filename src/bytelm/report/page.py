"""The report of a run: one self-contained HTML page, made from what was recorded, whether or not the run ended."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bytelm.errors import ResourceError
from bytelm.report.charts import Bar, bar_chart, histogram
from bytelm.report.glyphs import character, pieces
from bytelm.report.media import Media, gallery
from bytelm.report.patches import PatchView, fragment
from bytelm.report.recorded import Metrics, curve
from bytelm.report.sections import drift, learning, resources
from bytelm.report.style import definitions, document, escape, figure, folded, table
from bytelm.units import show_bytes

SAMPLES = 12  # shown, evenly through the training
TYPES = 12  # of files that are shown; what is left over is summed
NAMED = 40  # skipped files that are named


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
class Files:
    """What a corpus was made of: (type, (documents, bytes for training, validation and test)), and what was left out.

    `left_out` are (name, reason); `notes` are other losses, in words.
    """

    types: Sequence[tuple[str, Sequence[int]]]
    left_out: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ReportData:
    """All that a report can show; whatever is missing is left out of the page.

    `metrics` are the lines of metrics.jsonl (kinds it does not know are ignored); `views` are patch views with their
    captions; `compressors` name the bits per byte of gzip and its like on the held-out bytes. `media` stands in the
    place of all text samples. `unit` is what bits per byte are called. `subtitle` says what the model is, `state` how
    far it is, `key_figures` are (figure, what it counts), `cutting` is the patching's name, or "tokens"; `split` is
    that whose patches are counted, `command` goes on with the training.
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
    cutting: str = ""
    split: str = "test"
    files: Files | None = None
    command: str = ""


def render(data: ReportData) -> str:
    """The whole page. Nothing in `data` can become markup, and the page fetches nothing."""
    sections = (
        ("", _headline(data)),
        ("Learning", learning(data.metrics, data.unit)),
        ("By type of file", _file_types(data)),
        ("Patches" if data.cutting != "tokens" else "Tokens", _patches(data)),
        ("Samples", _samples(data) if data.media is None else gallery(data.media)),
        ("Time and memory", resources(data.metrics)),
        ("Data", _files(data.files) if data.files is not None else ""),
        ("Run", _run(data)),
    )
    pill = f'<span class="pill{"" if data.finished else " open"}">{escape(data.state)}</span>' if data.state else ""
    parts = [f"<header><h1>{escape(data.title)}</h1>\n<p>{escape(data.subtitle)} {pill}</p></header>"]
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
    parts = [_measured(data, data.held_out) if data.held_out is not None else _latest(data.metrics, data.unit)]
    if data.key_figures:
        tiles = "".join(f"<div><b>{escape(value)}</b> {escape(what)}</div>" for value, what in data.key_figures)
        parts.append(f'<div class="tiles">{tiles}</div>')
    return "\n".join(parts)


def _measured(data: ReportData, held: HeldOut) -> str:
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
        parts.append(f'<div class="columns">{figure(chart)}{figure(numbers)}</div>')
        parts.append(f'<p class="note">{note}</p>')
    if held.planes:
        planes = table(["plane", data.unit], [[name, f"{bits:.3f}"] for name, bits in held.planes.items()])
        parts.append(f'<div class="columns">{figure(planes)}</div>')
    return "\n".join(parts)


def _latest(metrics: Metrics, unit: str) -> str:
    """The headline of a run that was not evaluated: the last thing it measured while it trained."""
    for kind, meaning in (("valid", "on the validation bytes"), ("train", "on the training bytes")):
        points = curve(metrics, kind, x="step")
        if points:
            step, bits = points[-1]
            return f"{_figure(bits, unit)}\n<p>{meaning}, at step {step:,.0f}; not yet evaluated on held-out bytes</p>"
    return '<p class="note">Nothing has been measured yet.</p>'


def _figure(bits: float, unit: str) -> str:
    return f'<p class="figure">{bits:.3f} <small>{escape(unit)}</small></p>'


def _file_types(data: ReportData) -> str:
    """Held-out bits per byte of each type of file, in bars and in figures; empty where there is one type only."""
    held = data.held_out
    if held is None or not held.by_type:
        return ""
    by_type = sorted(held.by_type, key=lambda row: -row.bytes)
    head = ["held-out files", "bytes", data.unit, *(["bytes per patch"] if any(r.patches for r in by_type) else [])]
    rows = [
        [
            row.name,
            show_bytes(row.bytes),
            f"{row.bits_per_byte:.3f}",
            f"{row.bytes / row.patches:.2f}" if row.patches else "–",
        ]
        for row in by_type
    ]
    figures = [figure(table(head, [row[: len(head)] for row in rows]))]
    if len(by_type) > 1:
        bars = [Bar(row.name, row.bits_per_byte) for row in sorted(by_type[:TYPES], key=lambda row: row.bits_per_byte)]
        title = f"{data.unit.capitalize()} by type of file"
        words = (
            "What is hard is what is rare in the training files, and what is noise: check the bytes before the model."
        )
        figures.insert(0, figure(bar_chart(bars, data.unit, title), words))
    return f'<div class="columns">{"".join(figures)}</div>'


def _patches(data: ReportData) -> str:
    overall: list[str] = []
    if data.patch_lengths:
        chart = histogram(data.patch_lengths, "bytes in a patch", "patches", "Lengths of the patches")
        overall.append(figure(chart, f"Lengths of the patches that the {data.split} documents are cut into now."))
    overall.append(drift(data.metrics, data.cutting))
    views = [fragment(view, caption) for caption, view in data.views]
    return "\n".join([f'<div class="columns">{"".join(overall)}</div>'] * any(overall) + views)


def _samples(data: ReportData) -> str:
    """The newest samples, and the older ones folded."""
    through, now = list(dict.fromkeys(_recorded(data.metrics))), list(data.samples)
    if not through and not now:
        return ""
    count = min(SAMPLES, len(through))
    picks = [through[round(nth * (len(through) - 1) / max(1, count - 1))] for nth in range(count)]
    note = "The prompt is <mark>marked</mark>; what follows it, the model wrote."
    parts = [f'<p class="note">{note}</p>', *(_card(sample, "now") for sample in now)]
    parts += [_card(sample) for sample in picks[-1:]]
    if picks[:-1]:
        some = f"{count - 1} of {len(through) - 1} earlier samples" if count < len(through) else "Earlier samples"
        older = "\n".join(_card(sample) for sample in reversed(picks[:-1]))
        parts.append(folded(f"{some} after the same prompt", older))
    return "\n".join(parts)


def _recorded(metrics: Metrics) -> Iterator[Sample]:
    for line in metrics:
        step, prompt, text = line.get("step"), line.get("prompt"), line.get("text")
        if line.get("kind") == "sample" and isinstance(prompt, str) and isinstance(text, str):
            yield Sample(step if isinstance(step, int) else None, _encoded(prompt), _encoded(text))


def _encoded(text: str) -> bytes:
    """The bytes of a recorded string, a lone surrogate (which JSON lets through) included."""
    return text.encode("utf-8", "surrogatepass")


def _card(sample: Sample, when: str = "") -> str:
    when = when if sample.step is None else f"step {sample.step:,}"
    prompt = f"<mark>{_flowing(sample.prompt)}</mark>" if sample.prompt else ""
    return f'<div class="sample"><span>{when}</span><pre>{prompt}{_flowing(sample.text)}</pre></div>'


def _flowing(data: bytes) -> str:
    """Bytes as running text; those that are no character stand in small boxes."""
    shown = ((character(piece), piece) for piece in pieces(data))
    return "".join(f'<span class="hex">{p.hex().upper()}</span>' if text is None else escape(text) for text, p in shown)


def _files(files: Files) -> str:
    """What the corpus was made of, and what was left out and why."""
    types = sorted(files.types, key=lambda row: -sum(row[1][1:]))
    if len(types) > TYPES:
        rest = [sum(counts) for counts in zip(*(counts for _, counts in types[TYPES:]), strict=True)]
        types = [*types[:TYPES], (f"{len(types) - TYPES} more types", rest)]
    rows = [[name, f"{count:,}", *(show_bytes(n) if n else "–" for n in sizes)] for name, (count, *sizes) in types]
    parts = [figure(table(["type", "documents", "training", "validation", "test"], rows))]
    notes = [*files.notes]
    if files.left_out:
        reasons = Counter(reason for _, reason in files.left_out)
        notes.append("left out: " + ", ".join(f"{count} ({reason})" for reason, count in reasons.most_common()))
    else:
        notes.append("no file was left out")
    parts.append(f'<p class="note">{escape("; ".join(notes))}.</p>')
    if files.left_out:
        named = definitions(files.left_out[:NAMED])
        more = f", the first {NAMED} of {len(files.left_out)}" if len(files.left_out) > NAMED else ""
        parts.append(folded(f"What was left out{more}", named))
    return "\n".join(parts)


def _run(data: ReportData) -> str:
    parts = [definitions(list(data.facts.items()))] if data.facts else []
    if data.command:
        note = "From the folder in which it was begun, this goes on with it; with more --minutes, beyond its end:"
        parts.append(f'<p class="note">{note}</p><pre class="code">{escape(data.command)}</pre>')
    if data.config_toml:
        parts.append(folded("config.toml", f'<pre class="code">{escape(data.config_toml)}</pre>'))
    return "\n".join(parts)
