"""A training with its end: the final evaluation and the report. `bytelm.train` is `train` of this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bytelm.checkpoint.assemble import load
from bytelm.data.corpora import open_corpus
from bytelm.data.corpus import Split
from bytelm.data.modalities.base import Modality
from bytelm.data.selection import sample_evenly
from bytelm.device import use
from bytelm.evaluate.verdict import EvalReport, judge
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.inspection import Watch, inspect
from bytelm.interfaces.model import ByteModel
from bytelm.report.artifacts import keep_evaluation, keep_inspection
from bytelm.report.gather import gather
from bytelm.report.page import render, write
from bytelm.training import run as training
from bytelm.training.config import RunConfig
from bytelm.training.dist import is_main_process
from bytelm.training.stop import Interrupted, StopRequest

EVALUATED = 1 << 18  # held-out bytes that the final evaluation scores at the most
REPORT = "report.html"


@dataclass(frozen=True)
class Final:
    """The final evaluation of a run on held-out documents of `split` (both None where there are none), its report."""

    split: Split | None
    evaluation: EvalReport | None
    report: Path
    modality: Modality | None


@dataclass(frozen=True)
class Result(training.Result):
    """How a training ended; `final` is None where a signal ended it before, or no evaluation was wanted."""

    final: Final | None = None

    def mapping(self) -> dict[str, Any]:
        """As plain JSON."""
        evaluation = self.final.evaluation if self.final else None
        progress = asdict(self.progress) if self.progress else {}
        return {"run": str(self.run), **progress, "held_out": evaluation.mapping() if evaluation else None}


def train(
    paths: Sequence[str | Path],
    config: RunConfig,
    run: str | Path,
    *,
    quiet: bool = False,
    exclude: Sequence[Path] = (),
    log: Sequence[str] = (),
    force: bool = False,
    allow_change: Sequence[str] = (),
    evaluate: bool = True,
    watch: Watch | None = None,
) -> Result:
    """Train on `paths` in the directory `run`, or resume what it holds; then evaluate it and write its report.html.

    Folders `exclude` are not read. `log` names experiment trackers (`training.loggers`). `force` starts even if the
    estimate exceeds memory or disk. `allow_change` are settings of [train], as in "train.learning_rate", that may
    differ from those of the existing run. Without `evaluate` it ends with the last step; `watch` makes what is called
    with the progress of the evaluation.
    Raises DataError, ConfigError, CheckpointError, ResourceError or TrainingError; a signal is no error. And UsageError
    for a device that is not there.
    """
    with StopRequest():
        ended = training.train(
            paths,
            config,
            run,
            quiet=quiet,
            exclude=exclude,
            log=log,
            force=force,
            allow_change=allow_change,
            sample=continued,
        )
        result = Result(ended.run, ended.progress, ended.signal)
        # Of several processes the first one evaluates.
        if ended.signal is not None or not evaluate or not is_main_process():
            return result
        try:
            return Result(
                ended.run,
                ended.progress,
                None,
                finish(ended.run, use(config.train.device), watch, tables=config.train.tables),
            )
        except Interrupted as stopped:
            return Result(ended.run, ended.progress, stopped.signal)


def finish(
    run: Path, device: torch.device, watch: Watch | None = None, *, tables: Literal["device", "host"] = "device"
) -> Final:
    """Evaluate a run on held-out documents and write its report. Raises Interrupted where a signal asks to stop.

    `tables`: see `TrainConfig`.
    """
    watch = stoppable(watch)
    where = "memory" if tables == "host" and device.type != "cpu" else None
    loaded, corpus = load(run, device, tables=where), open_corpus(run / "data")
    splits: tuple[Split, ...] = ("test", "valid")
    split: Split | None = next((s for s in splits if corpus.bytes(s)), None)
    evaluation = None
    if split is not None:
        documents = sample_evenly(corpus, split, EVALUATED)
        progress = watch("evaluating", sum(len(data) for _, data in documents))
        context = loaded.state["context"]
        evaluation = judge(loaded.model, documents, context, progress=progress, modality=loaded.modality)
        keep_evaluation(run, loaded.state["step"], split, evaluation.mapping())
    inspection = inspect(run, loaded, watch)
    keep_inspection(run, inspection)
    write(run / REPORT, render(gather(run, inspection)))
    return Final(split, evaluation, run / REPORT, loaded.modality)


def continued(model: ByteModel, prompt: bytes, limit: int, seed: int) -> bytes:
    """What the model continues a prompt with: the text samples of validations."""
    return generate(model, [prompt], max_bytes=limit, sampling=Sampling(), seed=seed)[0].data


def stoppable(watch: Watch | None) -> Watch:
    """The same, with progress that a request to stop interrupts."""

    def watched(what: str, total: int) -> Callable[[int], None]:
        count = watch(what, total) if watch else None

        def counted(more: int) -> None:
            StopRequest.check()
            if count:
                count(more)

        return counted

    return watched
