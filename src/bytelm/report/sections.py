"""Sections from metrics.jsonl: training curves, patch lengths over the training, time and memory."""

from __future__ import annotations

from collections.abc import Sequence

from bytelm.report.charts import Bar, bar_chart
from bytelm.report.curves import Line, Panel, panels, strip
from bytelm.report.markup import Figure
from bytelm.report.recorded import Clock, Metrics, curve, intervals, marks, memory, phases, thinned
from bytelm.units import show_bytes, show_seconds

COLUMNS = 32  # of the strip of histograms
TALL, SHORT = 210, 83  # pixels of a panel, and of one of two stacked ones
NAMED = 3  # events that are described
WHY = {
    "entropy": "The entropy model is frozen before the first step and boundaries are computed once, so the rule stays "
    "the same:",
    "space": "The rule is fixed:",
    "tokens": "The vocabulary was trained before the first step:",
}
MIXED = "what changes here is the sampled data. In well-mixed data all columns look alike."


def show_lr(value: float) -> str:
    """Format a learning rate or a norm."""
    return f"{value:.2g}" if abs(value) > 1e-7 else "0"


def show_bits(value: float) -> str:
    """Format bits per byte."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def training_curves(metrics: Metrics, unit: str) -> list[Sequence[Figure]]:
    """Loss, learning rate and gradient norm; empty if nothing was recorded."""
    training, validation = curve(metrics, "train"), curve(metrics, "validation")
    if not training and not validation:
        return []
    clock, events = Clock.of(metrics), marks(metrics)
    lines = [
        Line("training", thinned(training), 0, show_bits),
        Line("validation", validation, 1, show_bits, dots=True),
    ]
    loss = panels([Panel(unit, lines, TALL, cut=True)], f"{unit.capitalize()} over the training", clock, events)
    rates = thinned(curve(metrics, "train", "learning_rate"))
    norms = thinned(curve(metrics, "train", "grad_norm"))
    steps = [
        Panel("learning rate", [Line("learning rate", rates, 2, show_lr)], SHORT, zero=True),
        Panel("gradient norm before clipping", [Line("gradient norm", norms, 3, show_lr)], SHORT, log=True),
    ]
    title = "Learning rate and gradient norm over the training"
    return [[Figure(loss)], *([[Figure(panels(steps, title, clock, events))]] if rates or norms else [])]


def summary_of_curves(metrics: Metrics, unit: str) -> str:
    """The final values of the curves, and the events, as text."""
    training, validation = curve(metrics, "train"), curve(metrics, "validation")
    sentences: list[str] = []
    tail = training[-max(1, len(training) // 10) :]
    if training and validation:
        mean = sum(value for _, value in tail) / len(tail)
        best = min(value for _, value in validation)
        last = validation[-1][1]
        sentences.append(
            f"Final training loss {mean:.3f} {unit} (mean of the last 10 %), final validation loss {last:.3f}, best "
            f"{best:.3f}; generalisation gap {last - mean:+.3f} (negative where the validation split is easier)."
        )
    elif training:
        sentences.append("The validation split is empty: overfitting cannot be seen here.")
    found = marks(metrics)
    for kind, sign in (("skipped", "▼"), ("resumed", "○")):
        own = [mark for mark in found if mark.kind == kind]
        if own:
            more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
            sentences.append(f"{sign} {kind}: {'; '.join(mark.words for mark in own[:NAMED])}{more}.")
    if len(training) > 1:
        sentences.append("The y-axis is clipped to values after the first 5 % of the training. Hover to read values.")
    return " ".join(sentences)


def lengths_over_training(metrics: Metrics, segmentation: str) -> Figure | None:
    """The patch lengths of training batches over time; None if they cannot change."""
    columns = intervals(metrics, COLUMNS)
    if segmentation not in WHY or len(columns) < 2:
        return None
    of, plural = ("token", "tokens") if segmentation == "tokens" else ("patch", "patches")
    longest = max(len(lengths) for line in metrics if isinstance(lengths := line.get("patch_lengths"), list))  # pyright: ignore[reportUnknownArgumentType]
    title = f"Length of training {plural} over the training"
    words = (
        f"Lengths of the training {plural}, one histogram per column; the line is their mean. Only {plural} that are "
        f"completely within a window are counted. {WHY[segmentation]} {MIXED}"
    )
    return Figure(strip(columns, of, longest, Clock.of(metrics), title), words)


def resources(metrics: Metrics) -> list[Sequence[Figure]]:
    """Wall-clock time and memory; empty for runs that did not record them."""
    first: list[Figure] = []
    second: list[Figure] = []
    spent = phases(metrics)
    if spent:
        whole = sum(spent.values())
        bars = [Bar(name, seconds, ours=name == "steps") for name, seconds in spent.items()]
        chart = bar_chart(bars, "seconds", "Wall-clock time by phase", lambda s: f"{_seconds(s)}, {s / whole:.0%}")
        words = (
            f"Wall-clock time by phase: {_seconds(whole)} in total over all sessions, final evaluation excluded. "
            "Phases before the steps run once."
        )
        first.append(Figure(chart, words))
    speeds = thinned(curve(metrics, "train", "bytes_per_second"))
    if len(speeds) > 1:
        line = Line("throughput", speeds, 6, show_bytes)
        panel = Panel("training throughput (bytes/s)", [line], SHORT + 20, zero=True)
        words = "Steps only. Dips are other load on the machine, or slow input."
        second.append(Figure(panels([panel], "Training throughput over the training", Clock.of(metrics)), words))
    second += _memory(metrics)
    return [column for column in (first, second) if column]


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else show_seconds(seconds)


def _memory(metrics: Metrics) -> list[Figure]:
    found = memory(metrics)
    if "peak" not in found:
        return []
    bars = [Bar("peak", found["peak"], ours=True)]
    if "baseline" in found:
        bars.append(Bar("before first step", found["baseline"]))
    if "predicted" in found:
        bars.append(Bar("predicted for a step", found["predicted"]))
    words = ["Peak memory of the process, validation and saving included, and its peak before the first step."]
    if "predicted" in found:
        words.append("Predicted: weights, optimizer state, activations and gradients, without Python and torch.")
    else:
        words.append("Memory is predicted for bfloat16 only.")
    if found["peak"] <= found.get("baseline", 0.0):
        words.append("Peak memory was reached during preparation.")
    return [Figure(bar_chart(bars, "bytes", "Memory (bytes)", show_bytes), " ".join(words))]
