"""What a comparison found, to be looked at: one picture, and one page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelm.compare.results import HEAD, HEAD_COSTS, rows
from bytelm.config import dump_toml
from bytelm.data.files import write_whole
from bytelm.report.charts import Bar, bar_chart, line_chart, page
from bytelm.report.style import document, escape, table
from bytelm.units import show_bytes, show_count, show_seconds

RESULTS, PICTURE, PAGE = "results.json", "picture.svg", "index.html"
SAME = {
    "flops": "the same operations a byte, and in all",
    "time": "the same seconds of training on this machine",
    "bytes": "the same bytes, and the same parameters beside embedding tables",
}


def write_all(found: Mapping[str, Any], home: Path) -> None:
    """The results for machines, the picture, and the page."""
    write_whole(home / RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    write_whole(home / PICTURE, page([charts(found)]).encode())
    write_whole(home / PAGE, html(found).encode())


def budget_of(found: Mapping[str, Any]) -> str:
    """The budget in words."""
    amount, match = found["budget"], found["match"]
    shown = {"flops": f"{amount:.3g} FLOPs", "time": show_seconds(amount), "bytes": show_bytes(amount)}
    return f"{shown[match]} a model: {SAME[match]}"


def charts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bits per byte of all models with their intervals, and as they fell with operations and seconds; with captions."""
    models = found["models"]
    bars = [Bar(m["model"], m["bits_per_byte"], m["low"], m["high"], ours=True) for m in models]
    bars += [Bar(name, bits) for name, bits in sorted(found["compressors"].items(), key=lambda item: item[1])]
    names = [model["model"] for model in models]

    def curve(of: str) -> dict[str, list[tuple[float, float]]]:
        return {m["model"]: [(point[of], point["bits_per_byte"]) for point in m["curve"]] for m in models}

    unit, described = "bits per byte", f"of {', '.join(names)}"
    against = line_chart(curve("flops"), "training FLOPs", unit, f"... against FLOPs, {described}", True, show_power)
    return [
        (
            bar_chart(bars, unit, f"Bits per byte {described}"),
            f"Held-out bits per byte, {show_bytes(found['measured_bytes'])} scored by each, with 95 % intervals; "
            f"{budget_of(found)}.",
        ),
        (
            against,
            "Looks at held-out windows while the models learnt, against operations executed (seed 0).",
        ),
        (
            line_chart(curve("seconds"), "seconds", unit, f"... against seconds, {described}", log_x=True),
            "The same against seconds of training on this machine.",
        ),
    ]


def show_power(value: float) -> str:
    """A large number as 2e13."""
    return f"{value:.3g}".replace("e+", "e")


def html(found: Mapping[str, Any]) -> str:
    """The whole page."""
    models = found["models"]
    title = f"{len(models)} models compared by bytelm"
    drawn = ((chart, escape(words)) for chart, words in charts(found))
    figures = "\n".join(f"<figure>{chart}<figcaption>{words}</figcaption></figure>" for chart, words in drawn)
    shown = rows(found)
    first = table(HEAD, [row[: len(HEAD)] for row in shown])
    costs = table([HEAD[0], *HEAD_COSTS], [[row[0], *row[len(HEAD) :]] for row in shown])
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(', '.join(found['paths']))} · {escape(budget_of(found))}</p>",
        f'<section><div class="columns">{figures}</div></section>',
        f"<section><h2>Measured</h2>{first}{costs}<p class=note>{escape(NOTE)}</p></section>",
        f"<section><h2>Differences</h2>{differences(found)}<p class=note>{escape(PAIRED)}</p></section>",
        *failures(found),
        f"<section><h2>Configurations</h2>{configurations(found)}</section>",
    ]
    return document(title, "\n".join(parts))


NOTE = (
    "Each model scored the same held-out bytes, each byte once; bits are summed and divided by the bytes of the files, "
    "for tokens too. Intervals are 95 % bootstrap intervals over documents. Parameters are those beside embedding "
    "tables. FLOPs are of a forward pass, three times which is a step: by the papers' formulas, as executed here "
    "(masked attention, hash tables and scorers counted), and in H-Net's convention, which counts input embeddings as "
    "products."
)
PAIRED = (
    "Bits per byte that the model of a line needs more than that of a column, with paired 95 % intervals: what makes a "
    "document hard for both does not count."
)


def differences(found: Mapping[str, Any]) -> str:
    """All pairs as a table."""
    names = [model["model"] for model in found["models"]]
    pairs = {(pair["than"], pair["model"]): pair for pair in found["differences"]}

    def cell(line: str, column: str) -> str:
        pair = pairs.get((line, column))
        if pair is None:
            return ""
        half = "" if pair["low"] is None else f" ±{(pair['high'] - pair['low']) / 2:.3f}"
        return f"{-pair['difference']:+.3f}{half}"

    cells = [[line, *(cell(line, column) for column in names[:-1])] for line in names[1:]]
    return f"<div class=matrix>{table(['', *names[:-1]], cells)}</div>"


def failures(found: Mapping[str, Any]) -> list[str]:
    """What came to no end, and why."""
    if not found["failed"]:
        return []
    lines = "".join(f"<p>{escape(name)}: {escape(reason)}</p>" for name, reason in found["failed"].items())
    return [f"<section><h2>Failed</h2>{lines}</section>"]


def configurations(found: Mapping[str, Any]) -> str:
    """Each model's configuration, folded away."""
    return "\n".join(
        f"<details><summary>{escape(m['model'])}: {show_count(m['parameters'])} parameters</summary>"
        f"<pre>{escape(dump_toml(m['config']))}</pre></details>"
        for m in found["models"]
    )
