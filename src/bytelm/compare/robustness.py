"""Suites of queries asked of every run of a comparison: one figure of each suite, a row per model.

HOME/robustness      what `bytelm robust` writes: answers, results.json and index.html with all figures of all runs
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from bytelm.compare.run import Outcome, folder_of
from bytelm.data.convert import modality_of
from bytelm.errors import UsageError
from bytelm.evaluate.robustness.base import Sources
from bytelm.find import find
from bytelm.report.markup import Table
from bytelm.robust.page import refusals, show_figure, write_all
from bytelm.robust.run import AMOUNT, KIND, RobustSpec, Watch, run_suites

ROBUSTNESS = "robustness"


def check(suites: Iterable[str], modality: Mapping[str, Any] | None) -> None:
    """Raises ConfigError for an unknown suite, UsageError for files that are no texts."""
    for name in suites:
        find(KIND, name)
        if modality and not modality_of(modality, "compare").text:
            raise UsageError(f"--suite {name}: the suites are of texts: leave it out with --as {modality['name']}")


def ask(outcome: Outcome, suites: Sequence[str], sources: Sources, device: str, watch: Watch) -> Any:
    """The headline figures of all models that were evaluated, from best to worst in bits per byte, as JSON.

    {"amount", "seed", "documents", "suites": {suite: {"title", "headline", "items", "manifest"}}, "models": [{"model",
    "naive", "suites": {suite: {"value", "seeds": {seed: value}}}}], "skipped": {suite: what it needs},
    "refused": [what could not be asked of whom]}. `value` is the
    mean over seeds. A model over tokens is there twice, the second time `naive`; one of transformers is naive only.

    Raises Interrupted by a signal: answers are kept, and the same call goes on from them.
    """
    runs = {
        str(outcome.home / folder_of(result["model"], result["seed"], result.get("factor", 1.0))): result
        for result in outcome.results
    }
    runs |= {result["model"]: result for result in outcome.foreign}
    place = outcome.home / ROBUSTNESS
    found = run_suites(RobustSpec(list(runs), suites, AMOUNT, device=device), sources, place, watch)
    if found["suites"]:
        write_all(found, place)
    return {
        **{key: found[key] for key in ("amount", "seed", "documents", "skipped")},
        "suites": {name: about(suite) for name, suite in found["suites"].items()},
        "models": models(found, runs),
        "refused": refusals(found["models"]),
    }


def about(suite: Mapping[str, Any]) -> dict[str, Any]:
    """A suite without its figures."""
    kept = {key: suite[key] for key in ("title", "items", "manifest")}
    return {**kept, "headline": suite["headline"]["label"]}


def models(found: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each model, over its runs, those that are asked as a model of tokens commonly is apart."""
    columns: dict[tuple[str, bool], dict[int | None, str]] = {}
    for column in found["models"]:
        result = runs[column["run"]]
        columns.setdefault((result["model"], column["naive"]), {})[result.get("seed")] = column["model"]
    return [
        {
            "model": model,
            "naive": naive,
            "suites": {
                name: figure
                for name, suite in found["suites"].items()
                if (figure := over_seeds(suite["headline"]["values"], seeds)) is not None
            },
        }
        for (model, naive), seeds in columns.items()
    ]


def over_seeds(values: Mapping[str, float], columns: Mapping[int | None, str]) -> dict[str, Any] | None:
    """The mean of a figure over the columns of a model, and each seed's; None for a model that does not have it."""
    known = {seed: values[column] for seed, column in columns.items() if column in values}
    if not known:
        return None
    return {"value": fmean(known.values()), "seeds": {str(s): value for s, value in known.items() if s is not None}}


def table(found: Mapping[str, Any]) -> Table:
    """A row per model, in the order of the comparison, and a column per suite; no rows without a suite."""
    own = found[ROBUSTNESS]
    order = [model["model"] for model in found["models"]]
    asked = own["models"] if own["suites"] else []
    rows = sorted(asked, key=lambda row: (order.index(row["model"]), row["naive"]))
    return Table(
        ["model", *(f"{name}: {suite['headline']}" for name, suite in own["suites"].items())],
        [
            [
                f"{row['model']}, naive" if row["naive"] else row["model"],
                *(cell(row["suites"].get(name)) for name in own["suites"]),
            ]
            for row in rows
        ],
    )


def unasked(found: Mapping[str, Any]) -> list[str]:
    """What was not measured, and why, line by line."""
    own = found[ROBUSTNESS]
    return [*(f"{name} was not measured: it needs {needs}" for name, needs in own["skipped"].items()), *own["refused"]]


def cell(figure: Mapping[str, Any] | None) -> str:
    """A figure, with the lowest and the highest seed where there are several."""
    if figure is None:
        return "–"
    seeds = figure["seeds"].values()
    shown = show_figure(figure["value"])
    return f"{shown} ({show_figure(min(seeds))} to {show_figure(max(seeds))})" if len(seeds) > 1 else shown
