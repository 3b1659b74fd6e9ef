"""A comparison at several budgets: bits per byte of every model at each, as one mapping, a table and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelm.compare import laws, laws_page
from bytelm.compare.page import PAGE, PICTURE, RESULTS, SAME, over
from bytelm.data.files import write_whole
from bytelm.report.charts import line_chart, page
from bytelm.report.markup import Figure, Table, rendered
from bytelm.units import show_bytes, show_power


def joined(found: Mapping[float, Mapping[str, Any]], fit: bool = False) -> dict[str, Any]:
    """The results of all budgets, as JSON: {"budgets": [...], "comparisons": {"1e12": what `summary` gives, ...}}.

    `fit`: with scaling laws of them, "fit", as `laws.fit_all` gives them.
    """
    first = next(iter(found.values()))
    asked = {key: first[key] for key in ("paths", "held_out", "match", "modality", "machine")}
    return {
        **asked,
        "budgets": list(found),
        "comparisons": {show_power(budget): dict(one) for budget, one in found.items()},
        "fit": laws.fit_all(found) if fit else None,
    }


def names(whole: Mapping[str, Any]) -> list[str]:
    """All models, from best to worst at the largest budget that each came to an end at."""
    ordered: list[str] = []
    for one in reversed(whole["comparisons"].values()):
        ordered += [model["model"] for model in one["models"] if model["model"] not in ordered]
        ordered += [name for name in one["diverged"] if name not in ordered]
    return ordered


def table(whole: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per model and a column per budget: bits per byte, and half the width of the interval."""
    return ["bits/byte", *whole["comparisons"]], [
        [name, *(_cell(one, name) for one in whole["comparisons"].values())] for name in names(whole)
    ]


def _cell(found: Mapping[str, Any], name: str) -> str:
    for model in found["models"]:
        if model["model"] == name:
            half = "" if model["low"] is None else f" ±{(model['high'] - model['low']) / 2:.3f}"
            return f"{model['bits_per_byte']:.3f}{half}"
    return "diverged" if name in found["diverged"] else "–"


def unsuited(whole: Mapping[str, Any]) -> list[str]:
    """Which models were left out at which budget, and why, line by line."""
    return [f"{budget}: {line}" for budget, one in whole["comparisons"].items() for line in one["unsuited"].values()]


def curves(whole: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(what was spent, bits per byte) of every trained model at each budget."""
    unit = {"flops": "training_flops", "time": "seconds", "bytes": "trained_bytes"}[whole["match"]]
    found: dict[str, list[tuple[float, float]]] = {}
    for one in whole["comparisons"].values():
        for model in one["models"]:
            if "foreign" not in model:
                found.setdefault(model["model"], []).append((model[unit], model["bits_per_byte"]))
    return {name: found[name] for name in names(whole) if name in found}


def chart(whole: Mapping[str, Any]) -> Figure:
    """Bits per byte against the budget."""
    label = {"flops": "training FLOPs", "time": "training time (s)", "bytes": "training bytes"}[whole["match"]]
    lines, largest = curves(whole), whole["comparisons"][show_power(max(whole["budgets"]))]
    title = f"Bits per byte against {label}, of {', '.join(lines)}"
    caption = f"Held-out bits per byte on {show_bytes(largest['measured_bytes'])}; each point is one training, or more."
    return Figure(line_chart(lines, label, "bits per byte", title, True, show_power), caption)


def write_all(whole: Mapping[str, Any], home: Path) -> None:
    """Write the results as JSON, the picture, and the page."""
    drawn = chart(whole)
    fitted = laws_page.figures(whole["fit"]) if whole["fit"] else []
    write_whole(home / RESULTS, (json.dumps(whole, indent=1) + "\n").encode())
    write_whole(home / PICTURE, page([[(drawn.chart, drawn.caption), *fitted]]).encode())
    write_whole(home / PAGE, html(whole, drawn).encode())
    if whole["fit"]:
        write_whole(home / laws.FIT, (json.dumps(whole["fit"], indent=1) + "\n").encode())


def html(whole: Mapping[str, Any], drawn: Figure) -> str:
    """The whole page."""
    (head, rows), fit = table(whole), whole["fit"]
    largest = whole["comparisons"][show_power(max(whole["budgets"]))]
    return rendered(
        "overview.html",
        title=f"{len(rows)} models compared at {len(whole['budgets'])} budgets by bytelm",
        paths=", ".join(whole["paths"]),
        budget=SAME[whole["match"]],
        over=over(largest["models"]),
        figures=[[drawn]],
        bits=Table(head, rows),
        laws=[(title, Table(head, rows)) for title, head, rows in (laws_page.tables(fit) if fit else ())],
        fitted=[[Figure(*figure)] for figure in (laws_page.figures(fit) if fit else ())],
        budgets=list(whole["comparisons"]),
        unsuited=unsuited(whole),
    )
