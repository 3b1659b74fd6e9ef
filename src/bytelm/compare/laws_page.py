"""Fitted scaling laws as tables and charts, see `laws`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bytelm.compare.fitting import Law
from bytelm.compare.page import show_power
from bytelm.compare.results import interval_of
from bytelm.report.charts import Fitted, fitted_chart
from bytelm.units import show_count

TITLES = {"parameters": "Best size at each budget", "patch_size": "Best patch size at each budget"}
LABELS = {"parameters": "non-embedding parameters", "patch_size": "bytes per patch"}
PLACES = {"smallest": "at most", "largest": "at least"}
BEYOND = 10.0  # times the largest budget: how far curves are drawn
STEPS = 24  # points of a curve

Rows = list[list[str]]


def tables(fit: Mapping[str, Any]) -> list[tuple[str, list[str], Rows]]:
    """Title, head and rows of each table that has any: scaling laws, optima, runs left out."""
    found = [("Scaling laws", law_head(fit), law_rows(fit))]
    for of, title in TITLES.items():
        head = ["models", "FLOPs", LABELS[of], "95 % CI", "bits/byte", "bytes per parameter", "tried", "exponent"]
        rows = [row for one in fit["optima"] if one["of"] == of for row in optimum_rows(one)]
        found.append((title, [name for name in head if of == "parameters" or name != "bytes per parameter"], rows))
    left_out = [[run["model"], show_power(run["budget"]), str(run["seed"]), run["reason"]] for run in fit["diverged"]]
    found.append(("Runs left out", ["model", "FLOPs", "seed", "reason"], left_out))
    return [(title, head, rows) for title, head, rows in found if rows]


def law_head(fit: Mapping[str, Any]) -> list[str]:
    """The head of `law_rows`."""
    far = show_power(beyond(fit))
    return ["model", "limit", "95 % CI", "exponent", "95 % CI", f"bits/byte at {far}", "95 % CI", *HELD_OUT]


HELD_OUT = ["without the largest budget", "measured", "predicted"]


def beyond(fit: Mapping[str, Any]) -> float:
    """Up to where laws are extrapolated in tables and charts."""
    return BEYOND * max(fit["budgets"])


def law_rows(fit: Mapping[str, Any]) -> Rows:
    """A row for each model: parameters, extrapolation, and the check at the largest budget."""
    found: Rows = []
    for model in fit["models"]:
        if model["law"] is None:
            found.append([model["model"], model["why"], *["–"] * (len(law_head(fit)) - 2)])
            continue
        law = Law.of(model["law"])
        low, high = law.intervals.get("offset", (None, None))
        limit = [f"{law.offset:.3f}", interval_of(low, high)] if law.form == "offset" else ["0, not fitted", "–"]
        at = beyond(fit)
        found.append(
            [
                model["model"],
                *limit,
                f"{law.exponent:.3f}",
                interval_of(*law.intervals["exponent"]),
                f"{law.bits(at):.3f}",
                interval_of(*law.interval(at)),
                *held_out_cells(model["held_out"]),
            ]
        )
    return found


def held_out_cells(check: Mapping[str, Any] | None) -> list[str]:
    """The check of one law at the largest budget."""
    if check is None:
        return ["–"] * len(HELD_OUT)
    shown = f"{check['predicted']:.3f} ({interval_of(check['low'], check['high'])})"
    return [shown, f"{check['measured']:.3f}", "hit" if check["inside"] else "miss"]


def optimum_rows(one: Mapping[str, Any]) -> Rows:
    """A row for each budget; the exponent is in the first."""
    names = ", ".join(one["models"])
    of_size = one["of"] == "parameters"
    width = 8 if of_size else 7
    if one["why"] is not None:
        return [[names, one["why"], *["–"] * (width - 2)]]

    def show(size: float) -> str:
        return show_count(size) if of_size else f"{size:.2f}"

    found: Rows = []
    for index, best in enumerate(one["minima"]):
        low, high = best["interval"] or (None, None)
        inside = best["place"] == "inside"
        exponent = "–" if one["exponent"] is None else f"{one['exponent']:.3f}"
        if one["interval"] is not None:
            exponent += f" ({interval_of(*one['interval'])})"
        found.append(
            [
                names if index == 0 else "",
                show_power(best["flops"]),
                show(best["size"]) if inside else f"{PLACES[best['place']]} {show(best['size'])}",
                "–" if low is None or high is None else f"{show(low)} to {show(high)}",
                f"{best['bits']:.3f}",
                *([f"{best['bytes'] / best['size']:.1f}" if inside else "–"] if of_size else []),
                f"{show(best['tried'][0])} to {show(best['tried'][1])}",
                exponent if index == 0 else "",
            ]
        )
    return found


def figures(fit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Charts with captions: the laws of all models, and optima that have a power law."""
    laws = {model["model"]: drawn(model, beyond(fit)) for model in fit["models"] if model["points"]}
    hits = [model["held_out"]["inside"] for model in fit["models"] if model["held_out"] is not None]
    checked = f" Fitted without the largest budget, {sum(hits)} of {len(hits)} predict it." if hits else ""
    chart = fitted_chart(laws, "training FLOPs", "bits per byte", "Scaling laws", show_power)
    largest = show_power(max(fit["budgets"]))
    found = [(chart, f"Fitted scaling laws with 95 % intervals; beyond {largest} FLOPs extrapolated.{checked}")]
    for of, label in LABELS.items():
        trends = {
            ", ".join(one["models"]): Fitted(
                [(best["flops"], best["size"]) for best in one["minima"] if best["place"] == "inside"],
                [(at, one["scale"] * (at / one["at"]) ** one["exponent"]) for at in steps(fit["budgets"])],
                [(best["flops"], *best["interval"]) for best in one["minima"] if best["interval"]],
            )
            for one in fit["optima"]
            if one["of"] == of and one.get("exponent") is not None
        }
        if trends:
            title = TITLES[of]
            found.append(
                (fitted_chart(trends, "training FLOPs", label, title, show_power), f"{title}, with 95 % intervals.")
            )
    return found


def drawn(model: Mapping[str, Any], most: float) -> Fitted:
    """One model's runs and law, up to `most` FLOPs."""
    points = [(at["flops"], bits) for at in model["points"] for bits in at["bits"]]
    if model["law"] is None:
        return Fitted(points, [], [])
    law = Law.of(model["law"])
    places = steps([law.lowest, most])
    return Fitted(points, [(at, law.bits(at)) for at in places], [(at, *law.interval(at)) for at in places])


def steps(budgets: list[float]) -> list[float]:
    """Evenly spaced logarithmically, from the least to the largest."""
    return [float(at) for at in np.geomspace(min(budgets), max(budgets), STEPS)]
