"""The results of robustness suites as rows of tables, as one picture, and as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bytelm.data.files import write_whole
from bytelm.evaluate.robustness import noise
from bytelm.report.charts import line_chart, page
from bytelm.report.markup import Figure, Table, rendered
from bytelm.robust.figures import LABELS
from bytelm.units import show_bytes, show_seconds

RESULTS, PICTURE, PAGE = "results.json", "picture.svg", "index.html"
ASIDE = {"changed", "original"}  # figures that are on the page only
Found = Mapping[str, Any]


def write_all(found: Found, home: Path) -> None:
    """Write the results as JSON, the picture, and the page."""
    write_whole(home / RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    write_whole(home / PAGE, html(found).encode())
    if drawn := charts(found):
        write_whole(home / PICTURE, page([drawn[i : i + 2] for i in range(0, len(drawn), 2)]).encode())


def show_figure(value: float) -> str:
    """A figure with three decimals, or three digits where it is large."""
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 100 else f"{value:,.0f}"  # + 0.0: never -0.000


def show_interval(cell: Mapping[str, float | None] | None) -> str:
    """A figure with its interval."""
    if cell is None or cell["value"] is None:
        return "–"
    if cell["low"] is None or cell["high"] is None:
        return show_figure(cell["value"])
    return f"{show_figure(cell['value'])} ({show_figure(cell['low'])} to {show_figure(cell['high'])})"


def tables(found: Found, suite: str, aside: bool = False) -> Iterator[Table]:
    """The tables of a suite, one per figure: rows against models, and what the others differ by from the first one.

    The first one of those that were asked it. `aside`: those of the page too.
    """
    own, models = found["suites"][suite], [model["model"] for model in found["models"]]
    first, *others = [model for model in models if model in own["seconds"]]
    # Of all models: a first one without patches must not hide those of the others.
    present = {key for row in own["rows"] for figures in row["figures"].values() for key in figures}
    for key in LABELS:
        if key not in present or (key in ASIDE and not aside):
            continue
        label = LABELS[key].format(own["per"], own["reference"])
        head = [f"{suite}: {label}", *models, *(f"{model} − {first}" for model in others)]
        rows = [
            [
                row["row"],
                *(show_interval(row["figures"].get(model, {}).get(key)) for model in models),
                *(show_interval(row["differences"].get(model, {}).get(key)) for model in others),
            ]
            for row in own["rows"]
            if any(key in figures for figures in row["figures"].values())
        ]
        yield Table(head, rows)


def refusals(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """The suites that models could not be asked, or rows of them, and why, line by line."""
    found: list[str] = []
    for model in models:
        for suite, reason in model.get("refused", {}).items():
            found.append(f"{suite} was not asked of {model['model']}: {reason}")
        for suite, rows in model.get("unwritten", {}).items():
            shown = "; ".join(rows)
            found.append(
                f"{suite} was not asked of {model['model']} where it takes more positions than the model has: {shown}"
            )
    return found


def summary(found: Found, suite: str) -> Table | None:
    """The further figures of a suite."""
    further = found["suites"][suite]["summary"]
    names = dict.fromkeys(name for figures in further.values() for name in figures)
    rows = [
        [name, *(show_figure(figures[name]) if name in figures else "–" for figures in further.values())]
        for name in names
    ]
    return Table([f"{suite}, all rows", *further], rows) if rows else None


def charts(found: Found) -> list[tuple[str, str]]:
    """Bits per byte lost against the strength of noise, a line per model: the mean, then each perturbation; captions.

    Empty without the suite.
    """
    own = found["suites"].get("noise")
    if own is None:
        return []
    models = [model["model"] for model in found["models"]]
    rows = {row["row"]: row["figures"] for row in own["rows"]}

    def drawn(lines: Mapping[str, Sequence[tuple[float, float]]], what: str) -> tuple[str, str]:
        title = f"Bits per byte lost against the strength of noise, {what}"
        return line_chart(lines, "characters changed (%)", "bits/byte lost", title), f"{what.capitalize()}."

    means = {
        model: [(float(s), values[key]) for s in noise.STRENGTHS if (key := noise.MEAN.format(s)) in values]
        for model, values in own["summary"].items()
    }
    each = [
        drawn(
            {m: [(s, rows[row][m]["difference"]["value"]) for s, row in points if m in rows[row]] for m in models}, name
        )
        for name, points in noise.curves(list(rows)).items()
    ]
    return [drawn(means, "mean over perturbations"), *each]


def html(found: Found) -> str:
    """The whole page."""
    parts: list[dict[str, Any]] = []
    for name, own in found["suites"].items():
        took = ", ".join(f"{model} {show_seconds(seconds)}" for model, seconds in own["seconds"].items())
        size = show_bytes(own["bytes"])
        further = summary(found, name)
        parts.append(
            {
                "name": name,
                "title": own["title"],
                "tables": [*tables(found, name, aside=True), *([further] if further else [])],
                "note": f"{own['items']:,} items, {size}; SHA-256 {own['manifest']}; time: {took}.",
            }
        )
    return rendered(
        "robustness.html",
        title=f"Robustness of {', '.join(model['model'] for model in found['models'])}",
        about=f"seed {found['seed']}, up to {found['amount']} items in each row, {found['documents']} documents",
        figures=[[Figure(chart, caption)] for chart, caption in charts(found)],
        suites=parts,
        skipped=found["skipped"],
        refused=refusals(found["models"]),
    )
