"""The parts of the page that metrics.jsonl alone tells: learning, the drift of patches, time and memory."""

from __future__ import annotations

from bytelm.report.charts import Bar, bar_chart
from bytelm.report.curves import Line, Panel, panels, strip
from bytelm.report.recorded import Clock, Metrics, curve, intervals, marks, memory, phases, thinned
from bytelm.report.style import escape, figure
from bytelm.units import show_bytes, show_seconds

COLUMNS = 32  # of the strip of histograms
TALL, SHORT = 210, 83  # pixels of a panel, and of one of two above each other
TOLD = 3  # marks that are told in words
WHY = {
    "entropy": "The scorer was frozen before the first step and boundaries were recorded once, so that the rule stays:",
    "space": "The rule is fixed:",
    "tokens": "The vocabulary was learnt before the first step:",
}
MIXED = "what changes here is the data that was drawn. In well-mixed data all columns look alike."


def rate(value: float) -> str:
    """A learning rate or a norm."""
    return f"{value:.2g}" if abs(value) > 1e-7 else "0"


def bits(value: float) -> str:
    """Bits per byte."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def speed(value: float) -> str:
    """Bytes in a second."""
    return show_bytes(value)


def learning(metrics: Metrics, unit: str) -> str:
    """Loss, learning rate and gradient norm; empty where nothing was recorded."""
    training, validation = curve(metrics, "train"), curve(metrics, "valid")
    if not training and not validation:
        return ""
    clock, happened = Clock.of(metrics), marks(metrics)
    lines = [Line("training", thinned(training), 0, bits), Line("validation", validation, 1, bits, dots=True)]
    loss = panels([Panel(unit, lines, TALL, cut=True)], f"{unit.capitalize()} over the training", clock, happened)
    rates = thinned(curve(metrics, "train", "learning_rate"))
    norms = thinned(curve(metrics, "train", "grad_norm"))
    steps = [
        Panel("learning rate", [Line("rate", rates, 2, rate)], SHORT, zero=True),
        Panel("gradient norm, before clipping", [Line("norm", norms, 3, rate)], SHORT, log=True),
    ]
    figures = [figure(loss)]
    if rates or norms:
        figures.append(figure(panels(steps, "Learning rate and gradient norm over the training", clock, happened)))
    return f'<div class="columns">{"".join(figures)}</div>\n<p class="note">{escape(_in_words(metrics, unit))}</p>'


def _in_words(metrics: Metrics, unit: str) -> str:
    """What the curves come to, and what happened on the way."""
    training, validation = curve(metrics, "train"), curve(metrics, "valid")
    said: list[str] = []
    tail = training[-max(1, len(training) // 10) :]
    if training and validation:
        mean = sum(value for _, value in tail) / len(tail)
        best = min(value for _, value in validation)
        last = validation[-1][1]
        said.append(
            f"At the end: training {mean:.3f} {unit} (mean of the last tenth), validation {last:.3f}, "
            f"a gap of {last - mean:+.3f} (below 0 where the validation documents are easier); "
            f"the best validation was {best:.3f}."
        )
    elif training:
        said.append("No validation documents: nothing here tells learning from learning by heart.")
    found = marks(metrics)
    for kind, sign in (("skipped", "▼"), ("resumed", "○")):
        own = [mark for mark in found if mark.kind == kind]
        if own:
            more = f" and {len(own) - TOLD} more" if len(own) > TOLD else ""
            said.append(f"{sign} {kind}: {'; '.join(mark.words for mark in own[:TOLD])}{more}.")
    if len(training) > 1:
        said.append("What fell in the first twentieth may begin above the picture. Point at a curve to read it.")
    return " ".join(said)


def drift(metrics: Metrics, cutting: str) -> str:
    """The lengths that were trained on, interval by interval; empty where there is nothing that could drift."""
    columns = intervals(metrics, COLUMNS)
    if cutting not in WHY or len(columns) < 2:
        return ""
    of = "token" if cutting == "tokens" else "patch"
    longest = max(len(lengths) for line in metrics if isinstance(lengths := line.get("patch_lengths"), list))  # pyright: ignore[reportUnknownArgumentType]
    chart = strip(columns, of, longest, Clock.of(metrics), f"Lengths of each {of} trained on, over the training")
    plural = "tokens" if of == "token" else "patches"
    words = (
        f"Lengths of the {plural} that were trained on, one histogram a column; the line is their mean. Counted over "
        f"whole {plural} inside their windows. {WHY[cutting]} {MIXED}"
    )
    return figure(chart, words)


def resources(metrics: Metrics) -> str:
    """Where the time and the memory went; empty for runs that did not record it."""
    first: list[str] = []
    second: list[str] = []
    spent = phases(metrics)
    if spent:
        whole = sum(spent.values())
        bars = [Bar(name, took, ours=name == "steps") for name, took in spent.items()]
        chart = bar_chart(bars, "seconds", "Seconds by what they went into", lambda s: f"{_took(s)}, {s / whole:.0%}")
        words = f"{_took(whole)} in all, without the closing measurement. What comes before steps is done once."
        first.append(figure(chart, words))
    speeds = thinned(curve(metrics, "train", "bytes_per_second"))
    if len(speeds) > 1:
        panel = Panel("bytes learnt from per second", [Line("per second", speeds, 6, speed)], SHORT + 20, zero=True)
        words = "Of steps alone. Dips are other work on the machine, or data that is slow to read."
        second.append(figure(panels([panel], "Bytes per second over the training", Clock.of(metrics)), words))
    second += _memory(metrics)
    columns = "".join(f"<div>{''.join(figures)}</div>" for figures in (first, second) if figures)
    return f'<div class="columns">{columns}</div>' if columns else ""


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else show_seconds(seconds)


def _memory(metrics: Metrics) -> list[str]:
    found = memory(metrics)
    if "peak" not in found:
        return []
    bars = [Bar("peak", found["peak"], ours=True)]
    if "before" in found:
        bars.append(Bar("peak before steps", found["before"]))
    if "predicted" in found:
        bars.append(Bar("predicted of a step", found["predicted"]))
    words = ["The most that the process ever held, looks and saves included, and the most before its first step."]
    if "predicted" in found:
        words.append("Predicted: weights, moments, activations and gradients of a step; Python and torch come to it.")
    else:
        words.append("A step's memory is predicted for bfloat16 alone.")
    if found["peak"] <= found.get("before", 0.0):
        words.append("No step needed more than the preparation had.")
    return [figure(bar_chart(bars, "bytes", "Memory", show_bytes), " ".join(words))]
