"""A comparison: plan, train and evaluate each model in turn; the same command resumes it, or shares the work.

HOME                  what `prepare` writes, and HOME/cells: which command trains what (`cells`)
HOME/blt-5-0/         the run of a model with seed 0, as of `bytelm train`, and its result.json
HOME/blt-5-0-rate-2/  the same at twice its learning rate (`rates`), and HOME/rates.json: what was chosen
HOME/foreign/         results of models of transformers, which are not trained
HOME/results.json     all results; HOME/index.html and HOME/picture.svg show them
HOME/1e12/            with several budgets: the runs and results of each; HOME/results.json has them side by side
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.checkpoint.lock import exclusive
from bytelm.checkpoint.metrics import METRICS
from bytelm.compare import foreign, rates
from bytelm.compare.candidates import candidate, candidates, listed
from bytelm.compare.cells import Cell, Failure, made, waiting, work_off
from bytelm.compare.plan import Planned
from bytelm.compare.prepare import ComparisonSpec, Place, joining, prepared, slug
from bytelm.data.files import write_whole
from bytelm.device import resolve
from bytelm.training.journal import Journal
from bytelm.training.stages.tokens import MERGES
from bytelm.training.stop import Interrupted, StopRequest
from bytelm.units import show_bytes, show_count, show_power, show_seconds

WORKER = "bytelm.compare.worker"


@dataclass
class Outcome:
    """How a session ended with one budget: results so far, failures, and the signal that stopped it."""

    plan: dict[str, Any]
    home: Path = Path()
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    foreign: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Of models of transformers, each once, whatever the seeds."""
    failures: dict[tuple[str, int], Failure] = field(default_factory=dict[tuple[str, int], Failure])
    """By model and seed."""
    rates: dict[str, Any] = field(default_factory=dict[str, Any])
    """What was tried of learning rates, and chosen, by family (`rates.chosen`)."""
    signal: int | None = None

    @property
    def failed(self) -> dict[str, str]:
        """Why each training failed that did."""
        return {f"{name}, seed {seed}": failure.reason for (name, seed), failure in self.failures.items()}


def run_all(spec: ComparisonSpec, home: Path, *, quiet: bool = False, dry: bool = False) -> list[Outcome]:
    """Train and evaluate what is missing, for each budget; `dry` only plans. A signal stops it, a call resumes it.

    Several commands share the trainings, unless time is what is equal: then a second one is refused.

    Raises DataError, UsageError, ConfigError, ResourceError and MissingExtraError before the first training; a later
    failure is reported, and the other models continue.
    """
    device, (_, others) = resolve(spec.device), listed(spec.models)
    foreign.check(others)
    made(home)
    journal = Journal(home / METRICS, quiet)
    with StopRequest(), contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(home, None if spec.match == "time" else waiting(journal, "comparison")))
            spec = joining(spec, home)
            corpus, places = prepared(spec, home, journal)
            named = foreign.evaluated(others, home, device, journal, dry=dry) if others else []
            if spec.match != "time":
                held.close()
            found = [Outcome(place.plan, place.home, foreign=named) for place in places]
            if not dry:
                worked(spec, places, found, corpus.directory, home, journal)
        except Interrupted as stopped:
            return [Outcome({}, signal=stopped.signal)]
    return found


def worked(
    spec: ComparisonSpec, places: Sequence[Place], found: Sequence[Outcome], data: Path, home: Path, journal: Journal
) -> None:
    """Have all cells trained, learning rates first, and gather what came out."""
    models = candidates(spec.models)

    def cell(place: Place, name: str, seed: int, factor: float = 1.0) -> Cell:
        return cell_of(spec, place, name, seed, factor, data, home, quiet=journal.quiet)

    tried = {
        (at, name, factor): cell(place, name, 0, factor)
        for at, place in enumerate(places)
        for name, factor in rates.trials(models, place, spec.rates)
    }
    work_off(list(tried.values()), home, journal)
    losses = {key: one.result["curve"][-1][2] if one.done else None for key, one in tried.items()}
    for at, outcome in enumerate(found):
        own = {(name, factor): bits for (index, name, factor), bits in losses.items() if index == at}
        if own:
            outcome.rates = rates.chosen(models, own)
            write_whole(outcome.home / rates.RATES, json.dumps(outcome.rates, indent=1).encode())
    cells = {
        (at, model.name, seed): cell(place, model.name, seed, rates.factor(found[at].rates, model))
        for seed in range(spec.seeds)
        for at, place in enumerate(places)
        for model in models
        if model.name in place.plan["models"]
    }
    work_off(list(cells.values()), home, journal)
    for (at, name, seed), one in cells.items():
        if one.done:
            found[at].results.append(one.result)
        elif (failure := one.failure) is not None:
            found[at].failures[name, seed] = failure


def cell_of(
    spec: ComparisonSpec, place: Place, name: str, seed: int, factor: float, data: Path, home: Path, *, quiet: bool
) -> Cell:
    """The training of a model with one seed."""
    run = place.home / folder_of(name, seed, factor)
    label = ", ".join(
        [name]
        + ([f"{show_power(place.spec.budgets[0])} {place.spec.unit}"] if spec.is_several else [])
        + ([f"learning rate × {factor:g}"] if factor != 1 else [])
        + [f"seed {seed}"]
    )
    job = {"home": str(place.home), "root": str(home), "name": name, "seed": seed, "factor": factor}
    job |= {"device": spec.device, "quiet": quiet}
    one = candidate(name)
    files = {MERGES: home / f"{one.tokenizer}.{MERGES}"} if one.tokens else {}
    return Cell("-".join(run.relative_to(home).parts), label, run, data, WORKER, job, files)


def folder_of(name: str, seed: int, factor: float = 1.0) -> str:
    """The folder of a model with one seed, at so many times its learning rate."""
    return f"{slug(name)}-{seed}" + (f"-rate-{factor:g}" if factor != 1 else "")


def expected(outcome: Outcome, spec: ComparisonSpec) -> tuple[list[str], list[list[str]]]:
    """The plan as a table: a head, one row per model, and the total time."""
    plan = outcome.plan
    head = ["model", "parameters", "+ tables", "MFLOP/byte", "to learn", "patch", "memory", "time, about"]
    found: list[list[str]] = []
    whole = 0.0
    for name in (one.name for one in candidates(spec.models)):
        if name in plan["unsuited"]:
            found.append([name, "–", "–", "–", "no size suits this budget", "–", "–", "–"])
            continue
        planned = Planned.of(plan["models"][name])
        counted = planned.costs
        seconds = planned.bytes / plan["speeds"][name] if planned.bytes else plan["budget"]
        whole += seconds * spec.seeds
        size = [show_count(counted.parameters - counted.tables), show_count(counted.tables)]
        work = [
            f"{counted.executed / 1e6:.3g}",
            show_bytes(planned.bytes) if planned.bytes else "–",
            f"{planned.mean:.2f}",
        ]
        found.append([name, *size, *work, show_bytes(planned.memory), show_seconds(seconds)])
    for one in outcome.foreign:
        size = [show_count(one["parameters"] - one["tables"]), show_count(one["tables"])]
        found.append([one["model"], *size, "–", "not trained", "–", "–", "–"])
    return head, [*found, [f"all, {spec.seeds} seeds" if spec.seeds > 1 else "all", *[""] * 6, show_seconds(whole)]]
