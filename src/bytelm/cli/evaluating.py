"""The command that measures a trained model: eval."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from bytelm.cli.common import (
    Device,
    Json,
    Quiet,
    Tables,
    Weights,
    counter,
    paths_of,
    print_json,
    print_table,
    print_verdict,
)
from bytelm.cli.foreign import evaluate_foreign
from bytelm.cli.online import Learners
from bytelm.data.modalities.base import Modality
from bytelm.data.names import after_prefix
from bytelm.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bytelm.checkpoint.assemble import Loaded
    from bytelm.evaluate.verdict import EvalReport
    from bytelm.interfaces.model import ByteModel

Precision = Literal["float32", "bfloat16"]

NO_PROOF = "--prove applies to hf: models only: for a run use bytelm compress, and decompress"
NO_TASKS = "--include-path is for --tasks: name a task in that folder"


def evaluate(
    run: Path,
    *paths: str,
    context: int | None = None,
    stride: int | None = None,
    windowing: Literal["basic", "sliding", "strided", "both"] | None = None,
    weights: Weights = None,
    tables: Tables = None,
    precision: Precision = "float32",
    learners: Learners | None = None,
    bytewise: Annotated[bool, Parameter(negative="")] = False,
    tasks: str | None = None,
    include_path: Path | None = None,
    prove: Annotated[bool, Parameter(negative="")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Bits per byte of files, each byte scored once, beside gzip, bzip2 and xz; or lm-evaluation-harness tasks.

    Example: bytelm eval runs/demo README.md src --json
    Example: bytelm eval hf:my-gpt2 README.md --prove

    Parameters
    ----------
    run
        A run, or one checkpoint of it; or hf:FOLDER or hf:OWNER/NAME, a causal model of Hugging Face transformers.
    paths
        Files to evaluate, as for train (default: the run's test split, whose result its report then shows).
    context
        Window length in bytes (default: the training context length); with hf: in tokens (default: 1024, or fewer).
    stride
        Bytes, with hf: tokens, between the starts of consecutive windows (default: half the context).
    windowing
        Instead of a stride: basic (no overlap), sliding (50 %), strided (two passes half a patch apart), both.
    precision
        Of matrix products: bfloat16 is faster on hardware with native support, with an error of about 0.0001.
    bytewise
        Of a token run: the exact bits of bytes, summed over tokenizations, beside those of its tokens.
    tasks
        Instead of files: tasks of the lm-evaluation-harness, comma-separated.
    include_path
        A folder with your own task files for --tasks.
    prove
        With hf: code the first 4096 bytes with the model's probabilities, decode them, and compare.
    """
    packing: dict[str, Any] = {"weights": weights, "tables": tables}
    learners = learners or Learners()
    alone: dict[str, Any] = {"windowing": windowing, "bytewise": bytewise or None, **learners.given}
    if after_prefix(str(run)) is not None:
        alone |= {**packing, "tasks": tasks, "include-path": include_path}
        read = partial(documents_of, paths_of(paths), None) if paths else None
        return evaluate_foreign(str(run), read, context, stride, precision, prove, device, quiet, json, **alone)
    if prove or (include_path is not None and tasks is None):
        raise UsageError(NO_PROOF if prove else NO_TASKS)
    if tasks is not None:
        alone["precision"] = None if precision == "float32" else precision
        return ask(run, paths, tasks, include_path, context, stride, device, json, packing, **alone)
    options = (context, stride, windowing, weights, tables, precision, device, quiet or json)
    return show_verdict(*measured(run, paths, *options, bytewise=bytewise, learners=learners), json)


def show_verdict(verdict: EvalReport, tokens: dict[str, float], json: bool) -> int:
    """Print a verdict, and of a token run that was measured in bytes what its `tokens` have; 0."""
    if json:
        print_json(verdict.mapping() | ({"tokens": tokens} if tokens else {}))
        return 0
    print_verdict(verdict)
    if tokens:
        rows = [("bytes", verdict.bits_per_byte), *tokens.items()]
        print_table(["predicted", verdict.unit], [(name.replace("_", " "), f"{bits:.4f}") for name, bits in rows])
    return 0


def measured(
    run: Path,
    paths: Sequence[str],
    context: int | None,
    stride: int | None,
    windowing: Literal["basic", "sliding", "strided", "both"] | None,
    weights: Weights,
    tables: Tables,
    precision: Precision,
    device: str,
    quiet: bool,
    *,
    bytewise: bool = False,
    learners: Learners | None = None,
) -> tuple[EvalReport, dict[str, float]]:
    """The bits per byte of files, or of the run's test split; and with `bytewise` those of the tokens, by kind."""
    from bytelm.checkpoint.assemble import load
    from bytelm.data.corpora import open_corpus
    from bytelm.data.selection import sample_evenly
    from bytelm.device import use
    from bytelm.evaluate.verdict import judge
    from bytelm.evaluate.windowing import for_measuring

    loaded = load(run, use(device), weights=weights, tables=tables, watch=partial(counter, quiet=quiet))
    if bytewise and loaded.model.tokens is None:
        raise UsageError(f"--bytewise is for runs over tokens, and {run} predicts bytes already: leave it out")
    found = (
        documents_of(paths_of(paths), loaded.modality) if paths else sample_evenly(open_corpus(run / "data"), "test")
    )
    learners = learners or Learners()
    window, total = context or loaded.state["context"], sum(len(data) for _, data in found)
    model, options = loaded.model, (context, stride, windowing, weights, tables, precision)
    plain = not paths and options == (None, None, None, None, None, "float32") and not (bytewise or learners.given)
    if windowing is not None:
        if stride is not None:
            raise UsageError(f"--windowing {windowing} cannot be combined with --stride {stride}: leave one out")
        model, stride = for_measuring(model, windowing, window)
    progress = counter("evaluating", total * (2 if learners.dynamic else 1), quiet)
    if bytewise:
        for name, value in {**learners.given, **({} if precision == "float32" else {"precision": precision})}.items():
            raise UsageError(f"--bytewise cannot be combined with --{name} {value}: leave one out")
        return both_ways(model, found, window, stride, progress, loaded.modality)
    memory, dynamic = learners.memory(run, found if paths else ()), learners.copy(model)
    evaluation = judge(
        model, found, window, stride, progress, loaded.modality, precision, memory=memory, dynamic=dynamic
    )
    if plain:
        keep(run, loaded, evaluation, quiet)
    return evaluation, {}


def both_ways(
    model: ByteModel,
    documents: Sequence[tuple[str, bytes | NDArray[np.uint8]]],
    context: int,
    stride: int | None,
    progress: Callable[[int], None] | None,
    modality: Modality | None,
) -> tuple[EvalReport, dict[str, float]]:
    """Bits per byte of a token model's bytes, and of its tokens: as they are, and of those that can follow alone."""
    from bytelm.decoding import bytewise
    from bytelm.evaluate.bits import measure
    from bytelm.evaluate.meter import Meter
    from bytelm.evaluate.renormalised import mean_bytes, renormalisation
    from bytelm.evaluate.verdict import judge

    as_bytes, mean = bytewise(model), mean_bytes(model, documents)
    verdict = judge(
        as_bytes, documents, round(context * mean), stride and max(1, round(stride * mean)), progress, modality
    )
    tokens = Meter.of(measure(model, documents, context=context, stride=stride)).bits_per_byte
    gain = Meter.of(renormalisation(model, documents, context=context, stride=stride)).bits_per_byte
    return verdict, {"tokens": tokens, "canonical_tokens": tokens - gain}


def keep(run: Path, loaded: Loaded, evaluation: EvalReport, quiet: bool) -> None:
    """Write what the report of a run is drawn from into the run; one that cannot be written is left as it is."""
    from bytelm.inspection import inspected
    from bytelm.report.artifacts import keep_evaluation

    try:
        keep_evaluation(run, loaded.state["step"], "test", evaluation.mapping())
        inspected(run, lambda: loaded, partial(counter, quiet=quiet))
    except ResourceError as error:
        print(f"not kept for the report: {error}", file=sys.stderr)


def ask(
    run: Path,
    paths: Sequence[str],
    tasks: str,
    include: Path | None,
    context: int | None,
    stride: int | None,
    device: str,
    json: bool,
    packing: Mapping[str, Any],
    **alone: object,
) -> int:
    """Run the harness's tasks, and print the scores. Options that are for files `alone` are refused."""
    if paths:
        raise UsageError(f"--tasks {tasks} cannot be combined with files: leave out {paths[0]}")
    for option, given in alone.items():
        if given is not None:
            raise UsageError(f"--{option} applies to files only: leave it out with --tasks {tasks}")
    from bytelm.device import use
    from bytelm.harness import run_tasks
    from bytelm.lm import load

    lm = load(run, use(device), **packing)
    found = run_tasks(lm, tasks.split(","), include, context=context, stride=stride)
    if json:
        print_json(found)
        return 0
    rows: list[tuple[str, str, str, str]] = []
    for task, values in found.items():
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{how}")
                rows.append((task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    print_table(["task", "metric", "value", "standard error"], rows)
    return 0


def documents_of(paths: list[str], modality: Modality | None) -> list[tuple[str, bytes]]:
    """(file, bytes) of each document; skipped and converted files are reported on standard error. Raises DataError."""
    from bytelm.data.convert import read
    from bytelm.data.report import SourceReport

    report = SourceReport()
    found = [(document.name, b"".join(document.pieces)) for document in read(paths, modality, report=report)]
    if not found:
        raise report.nothing(paths)
    if losses := report.losses():
        print(", ".join(losses), file=sys.stderr)
    return found
