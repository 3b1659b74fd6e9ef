"""The command that compares models: compare."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from bytelm.cli.common import Device, Json, Quiet, counter, paths_of, print_json, print_table
from bytelm.cli.robustness import sources_of
from bytelm.cli.training import name_of
from bytelm.compare.candidates import DEFAULT
from bytelm.errors import TrainingError, UsageError
from bytelm.training.stop import Interrupted, exit_code
from bytelm.units import show_power

if TYPE_CHECKING:
    from bytelm.compare.prepare import ComparisonSpec
    from bytelm.compare.run import Outcome

BUDGETS = {"flops": 1e13, "time": 300.0, "bytes": 4e6}


Home = Annotated[Path | None, Parameter(help="Run directory (default: runs/compare-NAME).")]
DryRun = Annotated[
    bool, Parameter(negative="", help="Choose the sizes of the models and estimate their cost, then exit.")
]
Models = Annotated[
    str,
    Parameter(
        help="Comma-separated: blt:5 (mean bytes per patch), space, hnet:5 (the same, learned), megabyte:8, "
        "megabyte-across:8 (bytes per patch), byte, byte-window:128 (attention window in bytes), linear, perceiver:256 "
        "(latents), bpe:4096 (vocabulary size), byte-window-ngrams and bpe-ngrams (with n-gram tables). Numbers are "
        "optional. blt@60: a size for 60 training bytes per parameter, where it is 30 otherwise. hf:FOLDER or "
        "hf:OWNER/NAME: a causal model of Hugging Face transformers, which is evaluated and not trained."
    ),
]
Budgets = Annotated[
    str | None,
    Parameter(
        help="Per training run: FLOPs, seconds or bytes (default: 1e13, 300 or 4e6). Several, as in 1e12,1e13, are "
        "shown in one table."
    ),
]
Seeds = Annotated[int, Parameter(help="Runs per model, with seeds 0 to N-1.")]
Fit = Annotated[
    bool,
    Parameter(
        negative="",
        help="Fit scaling laws to the results of several budgets: loss, best size and best patches by FLOPs. "
        "bytelm advise reads them.",
    ),
]
Suites = Annotated[
    list[str] | None,
    Parameter(
        negative="",
        help="A suite of bytelm robust, which every run is asked afterwards, on the held-out files: noise. May be "
        "repeated.",
    ),
]
Online = Annotated[
    bool,
    Parameter(
        negative="",
        help="Also bits per byte beside an online memory that begins empty, of every run. Slow for models of tokens.",
    ),
]
Rates = Annotated[
    int,
    Parameter(
        help="Learning rates tried for each family, as many for all: 2 tries 1/2 and 1 times its own at "
        "each budget, 3 also 2, 5 from 1/4 to 4, and takes the lowest validation loss."
    ),
]


def compare(
    *paths: str,
    models: Models = DEFAULT,
    match: Literal["flops", "time", "bytes"] = "flops",
    budget: Budgets = None,
    seeds: Seeds = 3,
    rates: Rates = 1,
    fit: Fit = False,
    held_out: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    suite: Suites = None,
    online: Online = False,
    modality: Annotated[str | None, Parameter(name="--as")] = None,
    run: Home = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Train models of several kinds at equal cost on the same files, and evaluate them on the same held-out bytes.

    Run the same command again to resume it; models, seeds and, where there are several, budgets can be added later.

    Commands on several machines share the trainings, if --run names one folder that all of them see.

    Example: bytelm compare ~/notes --models blt,byte-window,bpe:1024 --budget 1e12,1e13

    Parameters
    ----------
    paths
        Folders, files or glob patterns, as for train.
    match
        Quantity held equal: flops (per byte and total), time (seconds of training here) or bytes (and parameters).
    held_out
        Files to evaluate on (default: a held-out split of the documents of `paths`).
    modality
        Modality of the files, as for train: image:32, audio:16k, dna.
    """
    from bytelm.compare.prepare import ComparisonSpec
    from bytelm.compare.robustness import check
    from bytelm.compare.run import run_all
    from bytelm.training.settings import modality_table

    sources = sources_to_learn(paths, "compare")
    table, amounts = modality and modality_table(modality), (BUDGETS[match],) if budget is None else budgets_of(budget)
    asked = ComparisonSpec(sources, models, match, amounts, seeds, held_out or (), table or None, device, rates, fit)
    check(suite or (), asked.modality)
    home = run or Path("runs") / f"compare-{name_of(sources[0])}"
    outcomes = run_all(asked, home, quiet=quiet or json, dry=dry_run)
    if outcomes[0].signal is not None:
        print(f"saved in {home}; run the same command again to resume", file=sys.stderr)
        return 128 + outcomes[0].signal
    if dry_run:
        return foretell(outcomes, asked, json)
    return close(outcomes, asked, home, suite or (), online, quiet, json)


def budgets_of(text: str) -> tuple[float, ...]:
    """The budgets of a list such as "1e12,1e13". Raises UsageError."""
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise UsageError(f"--budget {text}: give a number, or several as in 1e12,1e13") from None


def sources_to_learn(paths: Sequence[str], command: str) -> list[str]:
    """The paths of a command that reads them more than once. Raises UsageError."""
    if not paths:
        raise UsageError(f"no files to read: name some, or folders, as in `bytelm {command} ~/notes`")
    if "-" in (sources := paths_of(paths)):
        raise UsageError("standard input cannot be read twice: name a file")
    return sources


def foretell(outcomes: Sequence[Outcome], asked: ComparisonSpec, json: bool) -> int:
    """Print the estimated cost of the models."""
    from bytelm.compare.run import expected

    if json:
        plans = [one.plan | ({"foreign": one.foreign} if one.foreign else {}) for one in outcomes]
        print_json(plans[0] if len(plans) == 1 else {"budgets": plans})
        return 0
    for outcome in outcomes:
        if len(outcomes) > 1:
            print(f"{show_power(outcome.plan['budget'])} {asked.unit}:")
        print_table(*expected(outcome, asked))
    return 0


def close(
    outcomes: Sequence[Outcome],
    asked: ComparisonSpec,
    home: Path,
    suites: Sequence[str],
    online: bool,
    quiet: bool,
    json: bool,
) -> int:
    """Print failures and results, ask the suites, read beside a memory, and write the reports."""
    from bytelm.compare import laws_page, overview, robustness
    from bytelm.compare.page import PAGE, RESULTS

    for outcome in outcomes:
        for name, reason in outcome.failed.items():
            print(f"{name} failed: {reason}", file=sys.stderr)
    if not any(outcome.results or outcome.foreign for outcome in outcomes):
        reasons = (reason for outcome in outcomes for reason in outcome.failed.values())
        raise TrainingError(f"no model finished: {'; '.join(reasons)}")
    found: dict[float, dict[str, Any]] = {}
    for outcome in outcomes:
        if len(outcomes) > 1 and not json:
            print(f"\n{show_power(outcome.plan['budget'])} {asked.unit}:")
        try:
            found[outcome.plan["budget"]] = closed(outcome, asked, suites, online, quiet, json)
        except Interrupted as stopped:
            where = outcome.home / robustness.ROBUSTNESS
            print(f"answers so far are in {where}; run the same command again to resume", file=sys.stderr)
            return exit_code(stopped.signal)
    whole = overview.joined(found, asked.fit) if len(outcomes) > 1 else found[outcomes[0].plan["budget"]]
    if len(outcomes) > 1:
        overview.write_all(whole, home)
    if json:
        print_json(whole)
        return 0
    if len(outcomes) > 1:
        print()
        print_table(*overview.table(whole))
        for line in overview.unsuited(whole):
            print(line)
        for title, head, rows in laws_page.tables(whole["fit"]) if asked.fit else ():
            print(f"\n{title}:")
            print_table(head, rows)
    reported = home if len(outcomes) > 1 else outcomes[0].home
    print(f"full report: {reported / PAGE}, {reported / RESULTS}")
    return 0


def closed(
    outcome: Outcome, asked: ComparisonSpec, suites: Sequence[str], online: bool, quiet: bool, json: bool
) -> dict[str, Any]:
    """The results of one budget: shown, written, with the answers to suites and a memory's. Raises Interrupted."""
    from bytelm.compare import online as memories
    from bytelm.compare import robustness
    from bytelm.compare.page import write_all
    from bytelm.compare.results import summary

    found = summary(outcome)
    write_all(found, outcome.home)
    if not json:
        show(found)
    watch = partial(counter, quiet=quiet or json)
    if online:
        found |= {"online": memories.ask(outcome, asked.device, watch)}
        write_all(found, outcome.home)
        if not json:
            figures = memories.table(found)
            print_table(figures.head, figures.rows)
    if suites:
        texts = sources_of([str(outcome.home)], asked.held_out)
        found |= {"robustness": robustness.ask(outcome, suites, texts, asked.device, watch)}
        write_all(found, outcome.home)
        if not json:
            show_suites(found)
    return found


def show(found: dict[str, Any]) -> None:
    """Print bits per byte and costs, and what the tokens of models of transformers lose."""
    from bytelm.compare.page import rates_table
    from bytelm.compare.results import HEAD, HEAD_COSTS, lost, rows

    cells = rows(found)
    print_table(HEAD, [row[: len(HEAD)] for row in cells])
    print_table([HEAD[0], *HEAD_COSTS], [[row[0], *row[len(HEAD) :]] for row in cells])
    compressors = ", ".join(f"{name} {bits:.3f}" for name, bits in found["compressors"].items())
    print(f"{found['measured_bytes']:,} held-out bytes, each scored once by every model; compressors: {compressors}")
    if (rates := rates_table(found["rates"])) is not None:
        print_table(rates.head, rates.rows)
    for line in lost(found):
        print(line)


def show_suites(found: dict[str, Any]) -> None:
    """Print what the models answered to suites, if they were asked any."""
    from bytelm.compare.robustness import table, unasked

    if "robustness" not in found:
        return
    if (figures := table(found)).rows:
        print_table(figures.head, figures.rows)
    for line in unasked(found):
        print(line)
