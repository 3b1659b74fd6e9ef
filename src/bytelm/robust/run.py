"""Asking models the queries of suites: one model after another, one suite after another; the same command resumes.

HOME/answers/        what each model answered to each suite, by the content of both
HOME/results.json    all figures; HOME/index.html and HOME/picture.svg show them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bytelm.checkpoint.lock import exclusive
from bytelm.device import AUTO, called, use
from bytelm.errors import DataError, ResourceError, UsageError
from bytelm.evaluate.robustness.base import Item, Sources, checksum
from bytelm.find import find, names
from bytelm.robust.answers import Answers, Asked, Progress, ask, unwritten_rows
from bytelm.robust.columns import Column, named, opened
from bytelm.robust.figures import results
from bytelm.training.stop import StopRequest

KIND = "evaluate.robustness"
AMOUNT = 100  # items in each row
Watch = Callable[[str, int], Progress | None]
"""(what, bytes) -> what is called with the bytes that are done."""


@dataclass(frozen=True)
class RobustSpec:
    """What is asked of whom."""

    runs: Sequence[str]
    suites: Sequence[str] = ()
    """Their names; none for all of them."""
    amount: int = AMOUNT
    seed: int = 0
    context: int | None = None
    device: str = AUTO

    def __post_init__(self) -> None:
        """Raises UsageError and ConfigError for what cannot be, CheckpointError for what is no run."""
        for option, value in (("amount", self.amount), ("context", self.context)):
            if value is not None and value < 1:
                raise UsageError(f"--{option} {value}: give at least 1")
        if not self.runs:
            raise UsageError("no model to measure: name a run that `bytelm train` wrote")
        self.models()
        self.modules()

    def models(self) -> dict[str, str]:
        """The runs, by the names under which they are shown."""
        return named(self.runs)

    def modules(self) -> dict[str, ModuleType]:
        """The suites, by name."""
        return {name: find(KIND, name) for name in self.suites or names(KIND)}


@dataclass(frozen=True)
class Suite:
    """A suite's items, made."""

    module: ModuleType
    items: list[Item]
    asked: Asked
    manifest: str

    @classmethod
    def of(cls, module: ModuleType, sources: Sources, spec: RobustSpec) -> Suite:
        """The suite of a module."""
        items = list(module.items(sources, spec.amount, spec.seed))
        return cls(module, items, Asked.of(items), checksum(items))


def items_of(sources: Sources, suites: Sequence[str], amount: int, seed: int) -> dict[str, list[Item]]:
    """The items of suites by name, of all suites where none is named. Raises UsageError, ConfigError."""
    if amount < 1:
        raise UsageError(f"--amount {amount}: give at least 1")
    return {name: list(find(KIND, name).items(sources, amount, seed)) for name in suites or names(KIND)}


def run_suites(spec: RobustSpec, sources: Sources, home: Path, watch: Watch) -> dict[str, Any]:
    """The results of all models in all suites that these texts are enough for, as JSON; of none, no model is asked.

    A model whose tokenizer cannot read a suite has no figures in it, and the reason is in its "refused", whichever
    model it is; a suite that no model can read has none at all. Rows that are written after longer prompts than it has
    positions for are in its "unwritten". Raises ResourceError, and Interrupted by a signal: what was answered by then
    is kept.
    """
    made = {name: Suite.of(module, sources, spec) for name, module in spec.modules().items()}
    suites = {name: suite for name, suite in made.items() if suite.items}
    device = use(spec.device)
    models = ask_models(spec, suites, device, home, watch) if suites else []
    answered = {
        name: {about["model"]: (suite.asked, answers[name]) for about, answers in models if name in answers}
        for name, suite in suites.items()
    }
    return {
        "seed": spec.seed,
        "amount": spec.amount,
        "documents": len(sources.documents),
        "device": called(device),
        "models": [about for about, _ in models],
        "suites": {name: suite_of(suites[name], some) for name, some in answered.items() if some},
        "skipped": {name: needs(suite.module) for name, suite in made.items() if not suite.items},
    }


def ask_models(
    spec: RobustSpec, suites: Mapping[str, Suite], device: torch.device, home: Path, watch: Watch
) -> list[tuple[dict[str, Any], dict[str, Answers]]]:
    """Of each column of each model: what it is, as JSON, and {suite: answers}."""
    try:
        (home / "answers").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {home} ({error.strerror}): choose another place with --run") from error
    with StopRequest(), exclusive(home):
        return [
            ask_column(column, path, suites, home, watch)
            for shown, path in spec.models().items()
            for column in opened(shown, path, device, spec.context)
        ]


def ask_column(
    column: Column, path: str, suites: Mapping[str, Suite], home: Path, watch: Watch
) -> tuple[dict[str, Any], dict[str, Answers]]:
    """What a column is, as JSON, with what could not be asked of it; and {suite: answers}."""
    answers: dict[str, Answers] = {}
    refused: dict[str, str] = {}
    unwritten: dict[str, list[str]] = {}
    for name, suite in suites.items():
        progress = watch(f"{column.name}: {name}", suite.asked.bytes)
        try:
            answers[name] = ask(column, suite.asked, place(home, name, suite, column), progress)
        except DataError as error:  # bytes that a tokenizer of text cannot read
            refused[name] = str(error)
        else:
            if rows := unwritten_rows(suite.items, suite.asked, answers[name]):
                unwritten[name] = rows
    about = {"model": column.name, "run": path, "naive": column.naive}
    about |= {"identity": column.identity, "context": column.context}
    lacking = {"refused": refused, "unwritten": unwritten}
    return about | {key: each for key, each in lacking.items() if each}, answers


def place(home: Path, name: str, suite: Suite, column: Column) -> Path:
    """Where the answers of a model to a suite are kept: whatever they depend on is in its name."""
    key = json.dumps([column.identity, suite.manifest, column.context])
    return home / "answers" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def needs(module: ModuleType) -> str:
    """What a suite lacks where it has no items."""
    return module.NEEDS or "longer texts"


def suite_of(suite: Suite, answered: dict[str, tuple[Asked, Answers]]) -> dict[str, Any]:
    """The results of one suite."""
    return {
        "title": suite.module.TITLE,
        "per": getattr(suite.module, "PER", ""),
        "manifest": suite.manifest,
        "items": len(suite.items),
        "bytes": suite.asked.bytes,
        "seconds": {name: answers.seconds for name, (_, answers) in answered.items()},
        **results(suite.module, suite.items, answered),
    }
