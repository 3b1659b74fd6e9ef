"""The command that compares models: compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from bytelm.cli.common import Device, Json, Quiet, paths_of, print_json, print_table
from bytelm.cli.training import name_of
from bytelm.compare.candidates import DEFAULT
from bytelm.errors import TrainingError, UsageError

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
    match
        Quantity held equal: flops (per byte and total), time (seconds of training here) or bytes (and parameters).
    budget
        Per training run: FLOPs, seconds or bytes (default: 1e13, 300 or 4e6).
    seeds
        Runs per model, with seeds 0 to N-1.
    held_out
        Files to evaluate on (default: a held-out split of the documents of `paths`).
    modality
        Modality of the files, as for train: image:32, audio:16k, dna.
    """
    if not paths:
        raise UsageError("nothing to compare on: name files or folders, as in `bytelm compare ~/notes`")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: give at least 1")
    from bytelm.compare.run import ComparisonSpec, run_all
    from bytelm.training.settings import modality_table

    sources = paths_of(paths)
    if "-" in sources:
        raise UsageError("standard input cannot be read once for each model: name a file")
    table, amount = modality and modality_table(modality), BUDGETS[match] if budget is None else budget
    asked = ComparisonSpec(sources, models, match, amount, seeds, held_out or (), table or None, device)
    home = run or Path("runs") / f"compare-{name_of(sources[0])}"
    outcome = run_all(asked, home, quiet=quiet or json, dry=dry_run)
    return foretell(outcome, asked, json) if dry_run and outcome.signal is None else close(outcome, home, json)


def foretell(outcome: Outcome, asked: ComparisonSpec, json: bool) -> int:
    """Print the estimated cost of the models."""
    from bytelm.compare.run import expected

    if json:
        print_json(outcome.plan)
    else:
        print_table(*expected(outcome.plan, asked))
    return 0


def close(outcome: Outcome, home: Path, json: bool) -> int:
    """Print failures and results, and write the report."""
    from bytelm.compare.page import PAGE, RESULTS, write_all
    from bytelm.compare.results import HEAD, HEAD_COSTS, rows, summary

    for name, reason in outcome.failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    if outcome.signal is not None:
        print(f"saved in {home}; run the same command again to resume", file=sys.stderr)
        return 128 + outcome.signal
    if not outcome.results:
        raise TrainingError(f"no model finished: {'; '.join(outcome.failed.values())}")
    found = summary(outcome, home)
    write_all(found, home)
    if json:
        print_json(found)
        return 0
    cells = rows(found)
    print_table(HEAD, [row[: len(HEAD)] for row in cells])
    print_table([HEAD[0], *HEAD_COSTS], [[row[0], *row[len(HEAD) :]] for row in cells])
    compressors = ", ".join(f"{name} {bits:.3f}" for name, bits in found["compressors"].items())
    print(f"{found['measured_bytes']:,} held-out bytes, each scored once by every model; compressors: {compressors}")
    print(f"full report: {home / PAGE}, {home / RESULTS}")
    return 0
