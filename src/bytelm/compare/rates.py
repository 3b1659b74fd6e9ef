"""Learning rates of a comparison: each family gets as many trials as every other one, by one rule.

With `--rates 3`, the first model of each family is trained at 1/2, 1 and 2 times its own learning rate, at each budget
and with seed 0. The lowest loss on the validation split, at the end, decides for all models of the family at this
budget; the held-out bytes are not looked at. The trial that was chosen is that model's run with seed 0. A rate that is
best at a small budget harms at three times as much (docs/log.md): so none is carried over to another budget. A family
whose best trial is the first or the last one gets no further ones: that is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bytelm.compare.candidates import Candidate
from bytelm.compare.prepare import Place

RATES = "rates.json"


def factors(count: int) -> list[float]:
    """So many powers of two about 1: 1/2, 1, 2 for three, 1/2, 1 for two."""
    return [2.0**exponent for exponent in range(-(count // 2), count - count // 2)]


def trials(models: Sequence[Candidate], place: Place, count: int) -> list[tuple[str, float]]:
    """(model, factor) of all trials at one budget: none for a count of 1."""
    if count < 2:
        return []
    first: dict[str, str] = {}
    for model in models:
        if model.name in place.plan["models"]:
            first.setdefault(model.family_name, model.name)
    return [(name, factor) for factor in factors(count) for name in first.values()]


def chosen(models: Sequence[Candidate], tried: Mapping[tuple[str, float], float | None]) -> dict[str, Any]:
    """For each family {"model", "trials": {factor: bits per byte or None}, "taken": factor, "edge"}, as JSON.

    `tried`: the validation loss of each model and factor, in bits per byte, None for one that came to no end; where
    none did, the family keeps its own rate. `edge`: the best trial was the first or the last one.
    """
    found: dict[str, Any] = {}
    for (name, factor), bits in tried.items():
        family = next(model.family_name for model in models if model.name == name)
        of = found.setdefault(family, {"model": name, "trials": {}})
        of["trials"][factor] = bits if bits is not None and math.isfinite(bits) else None
    for of in found.values():
        known = {factor: bits for factor, bits in of["trials"].items() if bits is not None}
        of["taken"] = min(known, key=lambda factor: known[factor]) if known else 1.0
        of["edge"] = bool(known) and of["taken"] in (min(of["trials"]), max(of["trials"]))
        of["trials"] = {f"{factor:g}": bits for factor, bits in of["trials"].items()}
    return found


def factor(chosen: Mapping[str, Any], model: Candidate) -> float:
    """What the learning rate of a model is multiplied by."""
    return chosen[model.family_name]["taken"] if model.family_name in chosen else 1.0
