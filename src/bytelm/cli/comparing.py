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

if TYPE_CHECKING:
    from bytelm.compare.run import ComparisonSpec, Outcome

BUDGETS = {"flops": 1e13, "time": 300.0, "bytes": 4e6}


def compare(
    *paths: str,
    models: str = DEFAULT,
    match: Literal["flops", "time", "bytes"] = "flops",
    budget: float | None = None,
    seeds: int = 1,
    held_out: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    suite: Annotated[list[str] | None, Parameter(negative="")] = None,
    modality: Annotated[str | None, Parameter(name="--as")] = None,
    run: Annotated[Path | None, Parameter(help="Run directory (default: runs/compare-NAME).")] = None,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Choose the sizes of the models and estimate their cost, then exit.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Train models of several kinds at equal cost on the same files, and evaluate them on the same held-out bytes.

    Run the same command again to resume after an interruption; models or seeds can be added later.

    Example: bytelm compare ~/notes --models blt,byte-window,bpe:1024 --budget 1e13

    Parameters
    ----------
    paths
        Folders, files or glob patterns, as for train.
    models
        Comma-separated: blt:5 (mean bytes per patch), space, megabyte:8 (bytes per patch), byte, byte-window:128
        (attention window in bytes), linear, perceiver:256 (latents), bpe:4096 (vocabulary size). Numbers are optional.
        hf:FOLDER or hf:OWNER/NAME, a causal model of Hugging Face transformers, is evaluated and not trained.
    match
        Quantity held equal: flops (per byte and total), time (seconds of training here) or bytes (and parameters).
    budget
        Per training run: FLOPs, seconds or bytes (default: 1e13, 300 or 4e6).
    seeds
        Runs per model, with seeds 0 to N-1.
    held_out
        Files to evaluate on (default: a held-out split of the documents of `paths`).
    suite
        A suite of bytelm robust, which every run is asked afterwards, on the held-out files: noise. May be repeated.
    modality
        Modality of the files, as for train: image:32, audio:16k, dna.
    """
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: give at least 1")
    from bytelm.compare.robustness import check
    from bytelm.compare.run import ComparisonSpec, run_all
    from bytelm.training.settings import modality_table

    sources = sources_to_learn(paths)
    table, amount = modality and modality_table(modality), BUDGETS[match] if budget is None else budget
    asked = ComparisonSpec(sources, models, match, amount, seeds, held_out or (), table or None, device)
    check(suite or (), asked.modality)
    home = run or Path("runs") / f"compare-{name_of(sources[0])}"
    outcome = run_all(asked, home, quiet=quiet or json, dry=dry_run)
    if dry_run and outcome.signal is None:
        return foretell(outcome, asked, json)
    return close(outcome, asked, home, suite or (), quiet, json)


def sources_to_learn(paths: Sequence[str]) -> list[str]:
    """The paths, which are read once for each model. Raises UsageError."""
    if not paths:
        raise UsageError("nothing to compare on: name files or folders, as in `bytelm compare ~/notes`")
    if "-" in (sources := paths_of(paths)):
        raise UsageError("standard input cannot be read once for each model: name a file")
    return sources


def foretell(outcome: Outcome, asked: ComparisonSpec, json: bool) -> int:
    """Print the estimated cost of the models."""
    from bytelm.compare.run import expected

    if json:
        print_json(outcome.plan | ({"foreign": outcome.foreign} if outcome.foreign else {}))
    else:
        print_table(*expected(outcome, asked))
    return 0


def close(outcome: Outcome, asked: ComparisonSpec, home: Path, suites: Sequence[str], quiet: bool, json: bool) -> int:
    """Print failures and results, ask the suites, and write the report."""
    from bytelm.compare import robustness
    from bytelm.compare.page import PAGE, RESULTS, write_all
    from bytelm.compare.results import summary

    for name, reason in outcome.failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    if outcome.signal is not None:
        print(f"saved in {home}; run the same command again to resume", file=sys.stderr)
        return 128 + outcome.signal
    if not (outcome.results or outcome.foreign):
        raise TrainingError(f"no model finished: {'; '.join(outcome.failed.values())}")
    found = summary(outcome, home)
    write_all(found, home)
    if not json:
        show(found)
    if suites:
        texts, watch = sources_of([str(home)], asked.held_out), partial(counter, quiet=quiet or json)
        try:
            found |= {"robustness": robustness.ask(outcome, suites, texts, home, asked.device, watch)}
        except Interrupted as stopped:
            where = home / robustness.ROBUSTNESS
            print(f"answers so far are in {where}; run the same command again to resume", file=sys.stderr)
            return exit_code(stopped.signal)
        write_all(found, home)
    if json:
        print_json(found)
        return 0
    show_suites(found)
    print(f"full report: {home / PAGE}, {home / RESULTS}")
    return 0


def show(found: dict[str, Any]) -> None:
    """Print bits per byte and costs, and what the tokens of models of transformers lose."""
    from bytelm.compare.results import HEAD, HEAD_COSTS, lost, rows

    cells = rows(found)
    print_table(HEAD, [row[: len(HEAD)] for row in cells])
    print_table([HEAD[0], *HEAD_COSTS], [[row[0], *row[len(HEAD) :]] for row in cells])
    compressors = ", ".join(f"{name} {bits:.3f}" for name, bits in found["compressors"].items())
    print(f"{found['measured_bytes']:,} held-out bytes, each scored once by every model; compressors: {compressors}")
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
