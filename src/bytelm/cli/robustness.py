"""The command that measures robustness: robust."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bytelm.cli.common import Device, Json, Quiet, counter, paths_of, print_json, print_table
from bytelm.errors import CheckpointError, DataError, UsageError
from bytelm.training.stop import Interrupted, exit_code

if TYPE_CHECKING:
    from bytelm.evaluate.robustness.base import Sources

READ = 1 << 23  # bytes of a test split that suites choose from


def robust(
    *runs_and_paths: Annotated[str, Parameter(name="RUN... PATH")],
    suite: Annotated[list[str] | None, Parameter(negative="")] = None,
    amount: int = 100,
    seed: int = 0,
    context: int | None = None,
    export: Annotated[Path | None, Parameter(negative="")] = None,
    run: Annotated[Path | None, Parameter(help="Folder of the results (default: runs/robust-NAME).")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """What noise, misspelling, cut prompts and unusual texts cost models, in bits on the same bytes for each.

    Run the same command again to resume after an interruption; runs and suites can be added later.

    Example: bytelm robust runs/demo
    Example: bytelm robust runs/blt runs/space notes.txt --suite noise --suite boundary

    Example: bytelm robust --export my-tasks notes.txt

    Parameters
    ----------
    runs_and_paths
        Runs, checkpoints or hf:MODEL (of transformers, asked for likelihoods of tokens), then files as for train.
        Default of these: the test split of the first run. Differences are to the first model.
    suite
        noise, boundary, scripts, degenerate; spelling, characters, copying, numbers, pronunciation, blimp.
        Default: all that the files are enough for. May be repeated.
    amount
        Items in each row of a suite, at most.
    seed
        Random seed; the same seed and files give the same items.
    export
        Ask no model: write the suites into this folder, as tasks of the lm-evaluation-harness for any model.
        They take the place of those that an earlier export wrote there.
    context
        Window length in bytes (default: the training context length of each run).
    """
    runs, paths = divided(runs_and_paths, asked=export is None)
    if export is not None:
        return export_suites(sources_of(runs, paths), suite or (), amount, seed, export, json)
    from bytelm.robust.run import RobustSpec, run_suites

    spec = RobustSpec(runs, suite or (), amount, seed, context, device)
    home = run or Path("runs") / f"robust-{Path(runs[0]).resolve().name}"
    try:
        found = run_suites(spec, sources_of(runs, paths), home, partial(counter, quiet=quiet or json))
    except Interrupted as stopped:
        print(f"answers so far are in {home}; run the same command again to resume", file=sys.stderr)
        return exit_code(stopped.signal)
    if not found["suites"]:
        raise nothing(found)
    show(found, home, json)
    return 0


def nothing(found: dict[str, Any]) -> DataError:
    """Why no suite was asked of any model."""
    from bytelm.robust.page import refusals

    lacking = [f"{name} needs {wants}" for name, wants in found["skipped"].items()]
    refused = refusals(found["models"])
    rest = ["name other suites with --suite, or other models"] if refused else []
    return DataError("; ".join([*lacking, *refused, *rest]))


def export_suites(sources: Sources, suites: Sequence[str], amount: int, seed: int, folder: Path, json: bool) -> int:
    """Write suites as tasks of the harness, and print their names."""
    from bytelm.evaluate.exported import export
    from bytelm.robust.run import items_of

    tasks = export(items_of(sources, suites, amount, seed), folder)
    if not tasks:
        raise DataError("these files are enough for no item of these suites: give longer texts")
    if json:
        print_json({"folder": str(folder), "tasks": tasks})
    else:
        print("\n".join(tasks))
        print(f"{len(tasks)} tasks in {folder}: bytelm eval RUN --tasks {tasks[0]} --include-path {folder}")
    return 0


def divided(arguments: Sequence[str], *, asked: bool) -> tuple[list[str], list[str]]:
    """Runs, and the paths after them. Raises UsageError without a run where one is `asked`, without either if not."""
    from bytelm.robust.columns import is_model

    if not arguments and not asked:
        raise UsageError("no texts to make tasks of: name files, as in `bytelm robust --export my-tasks notes.txt`")
    if not arguments:
        raise UsageError("no model to measure: name a run, as in `bytelm robust runs/demo`")
    runs = list(takewhile(is_model, arguments))
    if asked and not runs:
        runs = [arguments[0]]  # what is no run is refused when it is opened
    paths = list(arguments[len(runs) :])
    if is_model(runs[0] if runs else "") and (late := [path for path in paths if is_model(path)]):
        raise UsageError(f"{late[0]} is a model, and comes after texts: name models first, then texts")
    return runs, paths


def sources_of(runs: Sequence[str], paths: Sequence[str]) -> Sources:
    """The documents of files, or of the test split of the first run, which no model of transformers is.

    Raises DataError where there are none.
    """
    from bytelm.cli.evaluating import documents_of
    from bytelm.data.corpora import open_corpus
    from bytelm.data.names import after_prefix
    from bytelm.data.selection import sample_evenly
    from bytelm.data.sources import documents
    from bytelm.evaluate.published import holds_pairs
    from bytelm.evaluate.robustness.base import Sources

    if paths:
        names = paths_of(paths)
        pairs = [name for name in names if holds_pairs(name)]
        others = [name for name in names if name not in pairs]
        whole = [(document.name, b"".join(document.pieces)) for document in documents(pairs, None)]
        return Sources([*(documents_of(others, None) if others else []), *whole])
    own = next((run for run in runs if after_prefix(run) is None), None)
    if own is None:
        raise DataError(f"{runs[0]} has no test split here: name files after the models")
    try:
        found = sample_evenly(open_corpus(Path(own) / "data"), "test", READ)
    except (DataError, CheckpointError) as error:
        raise DataError(f"{error}; or name files after the runs") from error
    return Sources([(f"{number} {kind}", data.tobytes()) for number, (kind, data) in enumerate(found)])


def show(found: dict[str, Any], home: Path, json: bool) -> None:
    """Write the results and print them."""
    from bytelm.robust.page import PAGE, RESULTS, refusals, summary, tables, write_all

    write_all(found, home)
    if json:
        print_json(found)
        return
    for name in found["suites"]:
        for table in (*tables(found, name), summary(found, name)):
            if table is not None:
                print_table(table.head, table.rows)
    for name, needs in found["skipped"].items():
        print(f"{name} was not measured: it needs {needs}")
    for line in refusals(found["models"]):
        print(line)
    print(f"full report: {home / PAGE}, {home / RESULTS}")
