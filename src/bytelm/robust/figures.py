"""Figures of a suite from what models answered: ratios of sums, with intervals, and paired differences of models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bytelm.evaluate.meter import bootstrap
from bytelm.evaluate.robustness.base import MAIN, Item
from bytelm.robust.answers import Answers, Asked
from bytelm.units import LN2

LABELS = {
    "difference": "bits/byte lost",
    "changed": "bits/byte changed",
    "original": "bits/byte original",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "bits_per_byte": "bits/byte",
    "bytes_per_patch": "bytes/patch",
    "bytes_per_second": "bytes/s",
    "bits_per_unit": "bits/{}",
    "patches_per_unit": "patches/{}",
    "seconds_per_unit": "s/{}",
    "relative": "bits/{} relative to {}",
}
UNITS = 8  # from this many units on, units are resampled; below, items
Sums = dict[str, tuple[float, float]]
"""{figure: (numerator, denominator)}: a figure is the ratio of their sums over items."""
Reals = Float[NDArray[np.float64], "..."]


class Counted:
    """What one model's answers come to, item by item."""

    def __init__(self, asked: Asked, answers: Answers, per: str) -> None:
        self.nats = dict(zip(asked.likelihoods, answers.nats, strict=True))
        self.prompted = dict(zip(asked.prompted, answers.prompted, strict=True))
        self.documents = dict(zip(asked.documents, answers.documents, strict=True))
        self.written = dict(zip(asked.prompts, answers.written, strict=True))
        self.per = per

    def of(self, item: Item) -> Sums:
        """The sums of one item, its main figure first."""
        size = len(item.queries[0].continuation)
        if item.kind == "document":
            return self.of_document(item)
        if item.kind == "generation":
            right = self.written[item.queries[0]]
            # A row is there as a whole or not at all: others would be compared on other items.
            return {"exact_match": (math.nan if right is None else right, 1)}
        first = self.prompted if item.kind == "cut" else self.nats
        bits = [(first if place == 0 else self.nats)[query] / LN2 for place, query in enumerate(item.queries)]
        if item.kind == "choice":
            return {"accuracy": (bits[0] < min(bits[1:]), 1), "bits_per_byte": (bits[0], size)}
        if item.kind == "bits":
            return {"bits_per_byte": (bits[0], size)}
        original = bits[1] - (bits[2] if item.kind == "cut" else 0.0)
        return {"difference": (bits[0] - original, size), "changed": (bits[0], size), "original": (original, size)}

    def of_document(self, item: Item) -> Sums:
        """The sums of a document. A figure that a model does not have is 0 of 0."""
        size, found = len(item.queries[0].continuation), self.documents[item.queries[0]]
        bits, patches = found.nats / LN2, found.patches
        sums: Sums = {
            "bits_per_byte": (bits, size),
            "bytes_per_patch": (0, 0) if patches is None else (size, patches),
            "bytes_per_second": (size, found.seconds),
        }
        if self.per:
            sums["bits_per_unit"] = (bits, 1)
            sums["patches_per_unit"] = (0, 0) if patches is None else (patches, 1)
            sums["seconds_per_unit"] = (found.seconds, 1)
        return sums


def by_unit(items: Sequence[Item]) -> list[str]:
    """The unit of the bootstrap of each item of a row: its own, or the item alone where there are few units."""
    if len({item.unit for item in items}) >= UNITS:
        return [item.unit for item in items]
    return [f"{item.unit} {index}" for index, item in enumerate(items)]


def results(suite: ModuleType, items: Sequence[Item], columns: Mapping[str, tuple[Asked, Answers]]) -> dict[str, Any]:
    """The rows of a suite, and its further figures, of each of several models; differences are to the first one.

    {"rows": [{"row", "kinds", "items", "figures": {model: {figure: {"value", "low", "high"}}}, "differences": …}],
    "summary": {model: {name: value}}, "headline": {"label", "values": {model: value}}}
    """
    per: str = getattr(suite, "PER", "")
    counted = {name: Counted(asked, answers, per) for name, (asked, answers) in columns.items()}
    rows: dict[str, list[Item]] = {}
    for item in items:
        rows.setdefault(item.row, []).append(item)
    against = suite.reference(list(rows)) if hasattr(suite, "reference") else None
    found = [row_of(name, own, rows.get(against or "", []), counted) for name, own in rows.items()]
    whole = {"reference": against, "rows": found, "summary": summaries(suite, found, list(columns))}
    return {**whole, "headline": headline(suite, whole, list(columns))}


def summaries(suite: ModuleType, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """What a suite itself makes of its figures, for each model."""
    if not hasattr(suite, "summary"):
        return {}
    found: dict[str, Any] = {}
    for name in names:
        values = {row["row"]: {figure: each["value"] for figure, each in row["figures"][name].items()} for row in rows}
        found[name] = {key: float(value) for key, value in suite.summary(values).items()}
    return found


def headline(suite: ModuleType, found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The one figure that stands for a suite, of the models that have it: its HEADLINE, or a mean over rows.

    A model without the figure in some of the rows has no mean: it would be one over easier or harder rows.
    """
    declared: str | None = getattr(suite, "HEADLINE", None)
    if declared is not None:
        further = found["summary"]
        return {"label": declared, "values": {n: further[n][declared] for n in names if declared in further[n]}}
    kinds = {kind for row in found["rows"] for kind in row["kinds"]}
    main = next(figure for kind, figure in MAIN.items() if kind in kinds)
    rows = [row["figures"] for row in found["rows"] if any(MAIN[kind] == main for kind in row["kinds"])]
    having = [name for name in names if all(main in figures[name] for figures in rows)]
    return {
        "label": LABELS[main],
        "values": {name: fmean(figures[name][main]["value"] for figures in rows) for name in having},
    }


def row_of(
    name: str, items: Sequence[Item], reference: Sequence[Item], counted: Mapping[str, Counted]
) -> dict[str, Any]:
    """One row: every figure of every model, and how those of the others differ from the first one's."""
    units, models = by_unit(items), list(counted)
    tables = {model: summed(items, units, reference, counted[model]) for model in models}
    figures = [list(tables[model]) for model in models]
    sums = np.stack([both for table in tables.values() for both in table.values()], axis=1)  # [units, figures, 2]

    def measured(drawn: Reals) -> Reals:
        drawn = drawn.reshape(len(drawn), -1, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(drawn[..., 1] > 0, drawn[..., 0] / drawn[..., 1], np.nan)
        own = ratios.reshape(len(drawn), len(models), -1)
        return np.concatenate([ratios, (own[:, 1:] - own[:, :1]).reshape(len(drawn), -1)], axis=1)

    flat = sums.reshape(len(sums), -1)
    values, bounds = measured(flat.sum(0)[None])[0], None
    known = np.isfinite(values)
    if len(flat) > 1:
        bounds = np.full((2, len(values)), np.nan)
        bounds[:, known] = bootstrap(flat, lambda drawn: measured(drawn)[:, known])
    cells = iter([cell(index, values, bounds) for index in range(len(values))])
    return {
        "row": name,
        "kinds": sorted({item.kind for item in items}),
        "items": len(items),
        "figures": {model: present(keys, cells) for model, keys in zip(models, figures, strict=True)},
        "differences": {model: present(keys, cells) for model, keys in zip(models[1:], figures[1:], strict=True)},
    }


def present(keys: Sequence[str], cells: Iterator[dict[str, Any] | None]) -> dict[str, Any]:
    """The figures that a model has."""
    found = {key: next(cells) for key in keys}
    return {key: each for key, each in found.items() if each is not None}


def cell(index: int, values: Reals, bounds: Reals | None) -> dict[str, float | None] | None:
    """One figure with its interval; None where it is none."""
    if not np.isfinite(values[index]):
        return None
    low, high = (None, None) if bounds is None else (float(bounds[0, index]), float(bounds[1, index]))
    return {"value": float(values[index]), "low": low, "high": high}


def summed(
    items: Sequence[Item], units: Sequence[str], reference: Sequence[Item], counted: Counted
) -> dict[str, Reals]:
    """{figure: numerators and denominators `[units, 2]`} of a row. With a reference, the bits of its units too."""
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    found: dict[str, Reals] = {}

    def add(unit: str, sums: Sums) -> None:
        for figure, both in sums.items():
            found.setdefault(figure, np.zeros((len(places), 2)))[places[unit]] += both

    for item, unit in zip(items, units, strict=True):
        add(unit, counted.of(item))
    if reference:
        bits = {item.unit: counted.of(item)["bits_per_byte"][0] for item in reference}
        for item, unit in zip(items, units, strict=True):
            both = (counted.of(item)["bits_per_byte"][0], bits[item.unit]) if item.unit in bits else (0.0, 0.0)
            add(unit, {"relative": both})
    return found
