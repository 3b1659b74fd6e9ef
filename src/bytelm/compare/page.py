"""The results of a comparison as one picture and one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytelm.compare import online
from bytelm.compare.results import HEAD, HEAD_COSTS, lost, rows
from bytelm.compare.robustness import table, unasked
from bytelm.config import dump_toml
from bytelm.data.files import write_whole
from bytelm.report.charts import Bar, bar_chart, line_chart, page, show_plain
from bytelm.report.markup import Figure, Table, rendered
from bytelm.units import show_bytes, show_count, show_power, show_seconds

RESULTS, PICTURE, PAGE = "results.json", "picture.svg", "index.html"
SAME = {
    "flops": "equal FLOPs, per byte and in total",
    "time": "equal training time on this machine",
    "bytes": "equal training bytes, and equal non-embedding parameters",
}


def write_all(found: Mapping[str, Any], home: Path) -> None:
    """Write the results as JSON, the picture, and the page."""
    write_whole(home / RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    write_whole(home / PICTURE, page([charts(found)]).encode())
    write_whole(home / PAGE, html(found).encode())


def budget_of(found: Mapping[str, Any]) -> str:
    """The budget as text."""
    amount, match = found["budget"], found["match"]
    shown = {"flops": f"{amount:.3g} FLOPs", "time": show_seconds(amount), "bytes": show_bytes(amount)}
    rest = "; models of transformers are not trained" if any("foreign" in model for model in found["models"]) else ""
    return f"{shown[match]} per model: {SAME[match]}{rest}"


def charts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bits per byte of all models with their intervals, then against FLOPs and training time; with captions."""
    models = found["models"]
    bars = [Bar(m["model"], m["bits_per_byte"], m["low"], m["high"], ours=True) for m in models]
    bars += [Bar(name, bits) for name, bits in sorted(found["compressors"].items(), key=lambda item: item[1])]
    names = [model["model"] for model in models]

    def curve(of: str) -> dict[str, list[tuple[float, float]]]:
        return {m["model"]: [(point[of], point["bits_per_byte"]) for point in m["curve"]] for m in models}

    def against(of: str, label: str) -> str:
        title = f"Bits per byte against {label}, of {', '.join(names)}"
        return line_chart(curve(of), label, "bits per byte", title, True, show_power if of == "flops" else show_plain)

    size = show_bytes(found["measured_bytes"])
    remarks = ". ".join([budget_of(found), *(line for line in lost(found) if not line.startswith(" "))])
    return [
        (
            bar_chart(bars, "bits per byte", f"Bits per byte of {', '.join(names)}"),
            f"Held-out bits per byte on {size}, with 95 % confidence intervals over {over(models)}; {remarks}.",
        ),
        (
            against("flops", "training FLOPs"),
            "Validation loss during training against executed FLOPs (seed 0).",
        ),
        (
            against("seconds", "training time (s)"),
            "The same against training time on this machine.",
        ),
    ]


def over(models: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals of models are over."""
    return "documents and seeds" if any(len(model["seeds"]) > 1 for model in models) else "documents"


def rates_table(chosen: Mapping[str, Any]) -> Table | None:
    """The learning rates tried for each family: bits per byte in validation, and which was taken."""
    if not chosen:
        return None
    tried = list(next(iter(chosen.values()))["trials"])
    rows = [
        [
            family,
            of["model"],
            *("diverged" if of["trials"][one] is None else f"{of['trials'][one]:.3f}" for one in tried),
            f"× {of['taken']:g}" + (", at the edge" if of["edge"] else ""),
        ]
        for family, of in chosen.items()
    ]
    return Table(["family", "model", *(f"× {one}" for one in tried), "taken"], rows)


def html(found: Mapping[str, Any]) -> str:
    """The whole page."""
    models, shown = found["models"], rows(found)
    return rendered(
        "comparison.html",
        title=f"{len(models)} models compared by bytelm",
        paths=", ".join(found["paths"]),
        budget=budget_of(found),
        figures=[[Figure(chart, caption)] for chart, caption in charts(found)],
        quality=Table(HEAD, [row[: len(HEAD)] for row in shown]),
        costs=Table([HEAD[0], *HEAD_COSTS], [[row[0], *row[len(HEAD) :]] for row in shown]),
        differences=differences(found),
        lost=lost(found),
        online=online.table(found) if "online" in found else None,
        robustness=table(found) if "robustness" in found else None,
        unasked=unasked(found) if "robustness" in found else [],
        failed=found["failed"],
        rates=rates_table(found["rates"]),
        configurations=[
            (m["model"], show_count(m["parameters"]), dump_toml(m["config"])) for m in models if m["config"] is not None
        ],
    )


def differences(found: Mapping[str, Any]) -> Table:
    """The paired differences as a table."""
    names = [model["model"] for model in found["models"]]
    pairs = {(pair["baseline"], pair["model"]): pair for pair in found["differences"]}

    def cell(row: str, column: str) -> str:
        pair = pairs.get((row, column))
        if pair is None:
            return ""
        half = "" if pair["low"] is None else f" ±{(pair['high'] - pair['low']) / 2:.3f}"
        return f"{-pair['difference']:+.3f}{half}"

    return Table(["", *names[:-1]], [[row, *(cell(row, column) for column in names[:-1])] for row in names[1:]])
