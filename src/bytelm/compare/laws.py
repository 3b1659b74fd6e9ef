"""Scaling laws from the results of a comparison at several budgets: what `bytelm compare --fit` writes and shows.

    check(budgets)                         raises UsageError if they are too few; before the first training
    fit = fit_all({1e11: results, ...})    results: `results.summary` of each; fit: JSON, for HOME/fit.json
    fit = read(HOME or a file)             the same, checked
    laws_page.tables(fit)                  [(title, head, rows)] of text: laws, optima, runs left out
    laws_page.figures(fit)                 [(svg, caption)], as `page.charts` has them

Keys of `fit`: `version`; `budgets`; `corpus` (of the held-out bytes, with compressors' bits); `machine`;
    models     model, family, number, ratio; law (`fitting.Law.mapping`), or None and `why`; held_out, or None: the law
               without the largest budget, beside what was measured there; points: one per budget, what its runs were
    optima     of ("parameters": N*(C) over ratios; "patch_size": over a family's numbers), models, and
               `optima.Optimum.mapping`, or `why` there is none
    diverged   budget, model, seed, bits, reason: runs that are in no fit

A model's name is FAMILY[:NUMBER][@RATIO], the ratio in training bytes per non-embedding parameter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bytelm.compare.fitting import NEEDED, Law, fit_law, form_of
from bytelm.compare.optima import SIZES, Sizes, optimum
from bytelm.compare.plan import RATIO
from bytelm.errors import DataError, UsageError
from bytelm.units import UNIFORM

FIT, VERSION = "fit.json", 1
CORPUS = ("paths", "held_out", "modality", "train_bytes", "measured_bytes", "compressors")

Results = Mapping[str, Any]
Fit = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: a model at one budget, with one seed."""

    model: str
    family: str
    number: int | None
    """What follows the colon; None where the name has none."""
    ratio: float
    seed: int
    budget: float
    flops: float
    """Executed in training."""
    parameters: int
    """Non-embedding."""
    bytes: float
    """Trained on."""
    patch_size: float | None
    bits: float

    @property
    def diverged(self) -> bool:
        """Whether it learned nothing."""
        return not self.bits < UNIFORM


def parsed(model: str) -> tuple[str, int | None, float]:
    """Family, number and ratio of a model's name."""
    name, _, ratio = model.partition("@")
    family, _, number = name.partition(":")
    return family, int(number) if number else None, float(ratio) if ratio else float(RATIO)


def cells_of(results: Results) -> list[Cell]:
    """The runs of one comparison; models of transformers, which were not trained, have none."""
    return [
        Cell(
            model["model"],
            *parsed(model["model"]),
            int(seed),
            float(results["budget"]),
            model["training_flops"],
            model["parameters"] - model["tables"],
            model["trained_bytes"],
            model["patch_size"],
            math.nan if bits is None else float(bits),
        )
        for model in results["models"]
        if "foreign" not in model
        for seed, bits in model["seeds"].items()
    ]


def check(budgets: Sequence[float], match: str = "flops") -> None:
    """Raises UsageError if a law cannot be fitted to so few budgets, or to what is equal in them."""
    if match != "flops":
        raise UsageError(f"--fit with --match {match}: scaling laws are over FLOPs: leave --match out")
    count, needed = len(set(budgets)), NEEDED["power"]
    if count < needed:
        raise UsageError(
            f"--fit with {count} {'budget' if count == 1 else 'budgets'}: a scaling law needs {needed}, or "
            f"{NEEDED['offset']} for a limit that it approaches: give {needed - count} more to --budget"
        )


def fit_all(results: Mapping[float, Results]) -> Fit:
    """Every law and optimum of a comparison, as JSON. Raises UsageError and DataError for results that have none."""
    for one in results.values():
        check(list(results), one["match"])
    ordered = [results[budget] for budget in sorted(results)]
    same(ordered)
    cells = [cell for one in ordered for cell in cells_of(one)]
    sound = [cell for cell in cells if not cell.diverged]
    names = list(dict.fromkeys(cell.model for cell in cells))
    models = [model_of([cell for cell in sound if cell.model == name], name) for name in names]
    return {
        "version": VERSION,
        "budgets": sorted(results),
        "corpus": {key: ordered[-1][key] for key in CORPUS},
        "machine": ordered[-1]["machine"],
        "models": models,
        "optima": optima(sound),
        "diverged": [
            {
                "budget": cell.budget,
                "model": cell.model,
                "seed": cell.seed,
                "bits": cell.bits if math.isfinite(cell.bits) else None,
                "reason": f"{cell.bits:.3f} bits per byte: it learned nothing",
            }
            for cell in cells
            if cell.diverged
        ]
        + [failure(one, run, reason) for one in ordered for run, reason in unfinished(one).items()],
    }


def unfinished(results: Results) -> dict[str, str]:
    """Why runs have no result, those too that came to an end and learned nothing."""
    nothing = {f"{name}, seed {seed}": why for name, of in results["diverged"].items() for seed, why in of.items()}
    return nothing | results["failed"]


def same(ordered: Sequence[Results]) -> None:
    """Raises UsageError or DataError if results do not belong to one fit."""
    for one in ordered:
        if one["compressors"] != ordered[-1]["compressors"]:
            raise DataError(
                f"the held-out bytes at {one['budget']:.3g} FLOPs are not those at {ordered[-1]['budget']:.3g}: "
                "compare all budgets in one command"
            )


def failure(results: Results, run: str, reason: str) -> dict[str, Any]:
    """A run that has no result; `run`: its name in `failed`."""
    model, _, seed = run.rpartition(", seed ")
    return {"budget": float(results["budget"]), "model": model, "seed": int(seed), "bits": None, "reason": reason}


# --- models -----------------------------------------------------------------------------------------------------------


def law_of(cells: Sequence[Cell]) -> Law:
    """The law of one model's runs. Raises ValueError if they are at fewer than three budgets."""
    budgets = sorted({cell.budget for cell in cells})
    flops, bits = (
        np.array(column, np.float64) for column in zip(*((cell.flops, cell.bits) for cell in cells), strict=True)
    )
    return fit_law(flops, bits, np.array([budgets.index(cell.budget) for cell in cells], np.int64))


def model_of(cells: Sequence[Cell], name: str) -> dict[str, Any]:
    """One model: its law, what that predicts without the largest budget, and its runs."""
    family, number, ratio = parsed(name)
    budgets = sorted({cell.budget for cell in cells})
    lacking = NEEDED["power"] - len(budgets)
    return {
        "model": name,
        "family": family,
        "number": number,
        "ratio": ratio,
        "law": None if lacking > 0 else law_of(cells).mapping(),
        "why": f"runs at {len(budgets)} budgets: {lacking} missing" if lacking > 0 else None,
        "held_out": held_out(cells),
        "points": [point([cell for cell in cells if cell.budget == budget]) for budget in budgets],
    }


def point(cells: Sequence[Cell]) -> dict[str, Any]:
    """A model's runs at one budget."""
    one = cells[0]
    return {
        "budget": one.budget,
        "flops": one.flops,
        "bits": [cell.bits for cell in cells],
        "parameters": one.parameters,
        "bytes": one.bytes,
        "patch_size": one.patch_size,
    }


def held_out(cells: Sequence[Cell]) -> dict[str, Any] | None:
    """The largest budget as the others' law predicts it; None if they are too few."""
    largest = max((cell.budget for cell in cells), default=0.0)
    kept, last = ([cell for cell in cells if (cell.budget == largest) == at] for at in (False, True))
    if form_of(len({cell.budget for cell in kept})) is None:
        return None
    law, flops, measured = law_of(kept), last[0].flops, fmean(cell.bits for cell in last)
    low, high = law.interval(flops, runs=len(last))
    return {
        "budget": largest,
        "form": law.form,
        "predicted": law.bits(flops),
        "low": low,
        "high": high,
        "measured": measured,
        "inside": low <= measured <= high,
    }


# --- optima -----------------------------------------------------------------------------------------------------------


def optima(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The best size over ratios of each model, and the best patch size over numbers of each family."""
    groups: dict[tuple[str, str, float | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(("parameters", cell.family, cell.number), []).append(cell)
        if cell.patch_size is not None:
            groups.setdefault(("patch_size", cell.family, cell.ratio), []).append(cell)
    found = [(of, of_group(of, group)) for (of, _, _), group in groups.items() if several(group)]
    return [one for of in ("parameters", "patch_size") for kind, one in found if kind == of]


def several(cells: Iterable[Cell]) -> bool:
    """Whether runs are of more than one model."""
    return len({cell.model for cell in cells}) > 1


def of_group(of: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """The optimum of some models that differ in one size."""
    budgets = [
        Sizes(
            fmean(cell.flops for cell in here),
            np.array([cell.parameters if of == "parameters" else cell.patch_size for cell in here], np.float64),
            np.array([cell.bits for cell in here], np.float64),
            np.array([cell.bytes for cell in here], np.float64),
        )
        for budget in sorted({cell.budget for cell in cells})
        if (here := [cell for cell in cells if cell.budget == budget])
    ]
    best = optimum(budgets)
    most = max(one.different for one in budgets)
    why = f"{most} size{'' if most == 1 else 's'} at a budget: an optimum needs {SIZES}" if best is None else None
    names = sorted({cell.model for cell in cells})
    return {"of": of, "models": names, "why": why, **({} if best is None else best.mapping())}


# --- files ------------------------------------------------------------------------------------------------------------


def read(place: Path) -> Fit:
    """The fit in a comparison's folder, or in a file. Raises DataError if it is missing, damaged or another version."""
    path = place / FIT if place.is_dir() else place
    way_out = "make one with `bytelm compare PATH --budget 1e11,3e11,1e12 --fit`"
    try:
        found: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): {way_out}") from None
    except ValueError:
        raise DataError(f"{path} is not JSON: {way_out}") from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise DataError(f"{path} is a fit of version {version!r}, and {VERSION} is read here: {way_out}")
    try:
        for model in found["models"]:
            _ = parsed(model["model"]), model["points"], model["law"] is None or Law.of(model["law"]).bits(1e12)
        _ = [found["corpus"][key] for key in CORPUS], found["optima"], found["diverged"], found["budgets"]
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): {way_out}") from None
    return found
