"""The command that tries settings of a training: sweep."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from bytelm.cli.common import Json, Quiet, print_json, print_table
from bytelm.cli.comparing import sources_to_learn
from bytelm.cli.training import TrainOptions, name_of
from bytelm.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from bytelm.sweep.plan import SweepSpec
    from bytelm.sweep.run import Outcome
    from bytelm.sweep.space import Trial
    from bytelm.training.config import RunConfig


def sweep(
    *paths: str,
    asked: TrainOptions | None = None,
    over: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    search: Literal["grid", "random", "halving"] = "grid",
    trials: int | None = None,
    seeds: int = 1,
    run: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Say what would be trained, then exit.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Try settings of a training: every combination, some at random, or ever fewer with ever more of the budget.

    Run the same command again to resume it; values, trials and seeds can be added later.

    Commands on several machines share the trials, if --run names one folder that all of them see.

    Example: bytelm sweep ~/notes --bytes 2000000 --over train.learning_rate=1e-3,2e-3,4e-3
    Example: bytelm sweep ~/notes --bytes 4000000 --over train.learning_rate=1e-3..1e-2 --search random --trials 20

    Parameters
    ----------
    paths
        Folders, files or glob patterns, as for train.
    over
        Keys and what to try of each: key=value,value or, with --search random or halving, key=low..high.
    search
        grid: every combination. random: --trials of them.
        halving: all with a ninth of the budget, the best third with a third, the best ninth with all of it.
    trials
        How many to draw at random (default: 16).
    seeds
        Runs per trial, with seeds 0 to N-1.
    run
        Run directory (default: runs/sweep-NAME).
    """
    from bytelm.sweep.plan import SweepSpec
    from bytelm.sweep.run import run_sweep

    sources = sources_to_learn(paths, "sweep")
    home, options = run or Path("runs") / f"sweep-{name_of(sources[0])}", asked or TrainOptions()
    if options.mix is not None:
        raise UsageError("--mix: a sweep is over one source: leave it out")

    def configure(trial: Trial) -> RunConfig:
        return replace(options, set=[*(options.set or []), *settings(trial)]).configure(sources, home)

    spec = SweepSpec(sources, over or (), search, trials, seeds, options.device or "auto")
    outcome = run_sweep(spec, configure, home, quiet=quiet or json, dry=dry_run)
    if outcome.signal is not None:
        print(f"saved in {home}; run the same command again to resume", file=sys.stderr)
        return 128 + outcome.signal
    return foretell(outcome, spec, json) if dry_run else close(outcome, json)


def settings(trial: Trial) -> list[str]:
    """A trial as arguments of --set."""
    from bytelm.sweep.space import told

    return [f"{key}={told(value)}" for key, value in trial.items()]


def foretell(outcome: Outcome, spec: SweepSpec, json: bool) -> int:
    """Print what would be trained."""
    from bytelm.sweep.plan import shown

    plan = outcome.plan
    assert plan is not None
    rounds = [
        {"share": rung.share, "trials": count} for rung, count in zip(outcome.rungs, counts(outcome), strict=True)
    ]
    if json:
        print_json({"trials": plan.trials, "rounds": rounds, "seeds": spec.seeds})
        return 0
    print_table(["trial", "settings"], [[str(number), shown(trial)] for number, trial in enumerate(plan.trials)])
    for one in rounds:
        print(f"{one['trials']} trials with {one['share']:.2g} of the budget, {spec.seeds} seeds each")
    return 0


def counts(outcome: Outcome) -> list[int]:
    """How many trials each round has."""
    from bytelm.sweep.plan import SHARE

    found = [len(outcome.plan.trials if outcome.plan else ())]
    for _ in outcome.rungs[1:]:
        found.append(-(-found[-1] // SHARE))
    return found


def close(outcome: Outcome, json: bool) -> int:
    """Print failures and results, and write the report."""
    from bytelm.sweep.results import BEST, PAGE, RESULTS, head, rows, summary, write_all

    assert outcome.plan is not None
    found = summary(outcome)
    for name, reason in found["failed"].items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    if not found["trials"]:
        raise TrainingError(f"no trial finished: {'; '.join(found['failed'].values())}")
    write_all(found, outcome.plan, outcome.home)
    if json:
        print_json(found)
        return 0
    print_table(head(found), rows(found))
    print(f"full report: {outcome.home / PAGE}, {outcome.home / RESULTS}; the best: --config {outcome.home / BEST}")
    return 0
