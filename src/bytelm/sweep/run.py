"""A sweep: train every trial, or the better ones of ever fewer; the same command resumes it, or shares the work.

HOME                      what `plan` writes, and HOME/cells: which command trains what (`compare.cells`)
HOME/trial-003/seed-0     the run of a trial, as of `bytelm train`, and its result.json
HOME/trial-003/seed-0-of-9      with --search halving: the same with a ninth of the budget
HOME/results.json         all results; HOME/index.html and HOME/picture.svg show them; HOME/best.toml: the best trial
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.checkpoint.lock import exclusive
from bytelm.checkpoint.metrics import METRICS
from bytelm.compare.cells import Cell, Failure, made, waiting, work_off
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.meter import Meter
from bytelm.sweep.plan import RUNGS, SHARE, Configure, Plan, SweepSpec, prepared, shown
from bytelm.training.journal import Journal
from bytelm.training.stop import Interrupted, StopRequest

WORKER = "bytelm.sweep.worker"


@dataclass(frozen=True)
class Rung:
    """A round of halving, or the only round there is: some trials, with a share of the budget."""

    share: float
    trials: list[int]
    results: dict[int, list[dict[str, Any]]] = field(default_factory=dict[int, list[dict[str, Any]]])
    """By trial, one of each seed that came to an end."""
    failures: dict[tuple[int, int], Failure] = field(default_factory=dict[tuple[int, int], Failure])
    """By trial and seed."""

    def bits(self, trial: int) -> float:
        """What decides: bits per byte on the validation segments, the mean over seeds; infinity without a result."""
        found = [bits_in(result["valid"]) for result in self.results.get(trial, ())]
        mean = sum(found) / len(found) if found else math.inf
        return mean if math.isfinite(mean) else math.inf

    def order(self) -> list[int]:
        """Its trials, from best to worst."""
        return sorted(self.trials, key=self.bits)


def bits_in(documents: Sequence[Sequence[Any]]) -> float:
    """Bits per byte of segments as a worker wrote them: (name, bytes, nats) each."""
    return Meter.of(DocumentBits(*document) for document in documents).bits_per_byte


@dataclass
class Outcome:
    """How a session of a sweep ended: the rounds so far, and the signal that stopped it."""

    plan: Plan | None
    home: Path
    rungs: list[Rung] = field(default_factory=list[Rung])
    signal: int | None = None


def shares(search: str, trials: int) -> list[float]:
    """The share of the budget in each round: only one, but for halving."""
    if search != "halving":
        return [1.0]
    rungs = max(1, min(RUNGS, 1 + math.floor(math.log(max(1, trials), SHARE) + 1e-9)))
    return [SHARE ** -(rungs - 1 - rung) for rung in range(rungs)]


def run_sweep(spec: SweepSpec, configure: Configure, home: Path, *, quiet: bool = False, dry: bool = False) -> Outcome:
    """Train and measure all trials that are missing; `dry` only plans. A signal stops it, a call resumes it.

    Several commands share the trainings. Raises DataError, UsageError, ConfigError and ResourceError before the first
    training; a later failure is reported, and the other trials continue.
    """
    made(home)
    journal = Journal(home / METRICS, quiet)
    with StopRequest():
        try:
            with exclusive(home, waiting(journal, "sweep")):
                corpus, plan = prepared(spec, configure, home, journal)
            outcome, left = Outcome(plan, home), list(range(len(plan.trials)))
            for share in shares(spec.search, len(left)):
                rung = Rung(share, left)
                outcome.rungs.append(rung)
                if not dry:
                    worked(spec, plan, rung, corpus.directory, home, journal)
                    better = rung.order()[: math.ceil(len(left) / SHARE)]
                    left = [trial for trial in better if math.isfinite(rung.bits(trial))]
        except Interrupted as stopped:
            return Outcome(None, home, signal=stopped.signal)
    return outcome


def worked(spec: SweepSpec, plan: Plan, rung: Rung, data: Path, home: Path, journal: Journal) -> None:
    """Have the trials of a round trained, and gather what came out."""
    cells = {
        (trial, seed): cell_of(spec, plan, rung, trial, seed, data, home, quiet=journal.quiet)
        for seed in range(spec.seeds)
        for trial in rung.trials
    }
    work_off(list(cells.values()), home, journal)
    for (trial, seed), one in cells.items():
        result = one.result if one.done else None
        failure = one.failure if result is None else Failure.of_bits(bits_in(result["valid"]))
        if failure is not None:
            rung.failures[trial, seed] = failure
        elif result is not None:
            rung.results.setdefault(trial, []).append(result)


def cell_of(
    spec: SweepSpec, plan: Plan, rung: Rung, trial: int, seed: int, data: Path, home: Path, *, quiet: bool
) -> Cell:
    """The training of a trial with one seed."""
    part = round(1 / rung.share)
    run = home / f"trial-{trial:03d}" / (f"seed-{seed}" + (f"-of-{part}" if part > 1 else ""))
    label = f"trial {trial}, {shown(plan.trials[trial])}, seed {seed}"
    label += f", 1/{part} of the budget" if part > 1 else ""
    job = {"home": str(home), "trial": trial, "seed": seed, "share": rung.share}
    job |= {"device": spec.device, "quiet": quiet}
    return Cell("-".join(run.relative_to(home).parts), label, run, data, WORKER, job)


def failed(rungs: Sequence[Rung], plan: Plan) -> dict[str, str]:
    """Why each training failed that did."""
    return {
        f"trial {trial}, {shown(plan.trials[trial])}, seed {seed}": failure.reason
        for rung in rungs
        for (trial, seed), failure in rung.failures.items()
    }
