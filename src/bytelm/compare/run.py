"""A comparison: plan, train and evaluate each model in turn; the same command resumes it.

HOME/data            the corpus, packed once, with boundaries and tokens
HOME/held-out.bin    the evaluated segments
HOME/plan.json       the specification, and each model sized to the budget
HOME/blt-5-0/        the run of a model with seed 0, as of `bytelm train`, and its result.json
HOME/foreign/        results of models of transformers, which are not trained
HOME/results.json    all results; HOME/index.html and HOME/picture.svg show them
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.checkpoint.lock import exclusive
from bytelm.checkpoint.metrics import METRICS
from bytelm.compare import foreign, held_out
from bytelm.compare.candidates import Candidate, candidates, listed
from bytelm.compare.plan import Budget, Match, Planned, check_memory, mean_of, planned
from bytelm.compare.worker import FAILED, HELD_OUT, PLAN, RESULT
from bytelm.data.convert import modality_of, read
from bytelm.data.corpus import INDEX, Corpus, iterate_documents
from bytelm.data.files import write_whole
from bytelm.data.modalities.base import Modality
from bytelm.data.options import DataConfig
from bytelm.data.packed import pack_of
from bytelm.data.sources import expanded, fingerprint
from bytelm.device import AUTO, memory, resolve
from bytelm.errors import ConfigError, DataError, ResourceError
from bytelm.training.estimate import TRAINING, bytes_per_second
from bytelm.training.journal import Journal
from bytelm.training.stages.base import run_stage
from bytelm.training.stages.packing import PackingStage
from bytelm.training.stages.tokens import MERGES, TokenizerStage
from bytelm.training.stop import Interrupted, StopRequest
from bytelm.units import show_bytes, show_count, show_seconds

CONFIG = "config.toml"  # of a run that was started
PROBED = 1e7  # training bytes of the model by which the machine is timed
LEAST = 1 << 16  # training bytes


@dataclass(frozen=True)
class ComparisonSpec:
    """What is compared. All but `models`, `seeds` and `device` are fixed for the life of a comparison."""

    paths: Sequence[str]
    models: str
    match: Match
    budget: float
    seeds: int = 1
    held_out: Sequence[str] = ()
    modality: Mapping[str, Any] | None = None
    device: str = AUTO

    @property
    def excluded(self) -> list[Path]:
        """Held-out files, which are not trained on where they are among `paths`."""
        return [Path(file) for path in self.held_out for file in expanded(str(path))]

    def lasting(self) -> dict[str, Any]:
        """The fixed fields, as JSON."""
        paths = {"paths": list(map(str, self.paths)), "held_out": list(map(str, self.held_out))}
        return {**paths, "match": self.match, "budget": self.budget, "modality": dict(self.modality or {}) or None}


@dataclass
class Outcome:
    """How a session ended: results so far, failures with reasons, and the signal that stopped it."""

    plan: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    foreign: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Of models of transformers, each once, whatever the seeds."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    signal: int | None = None


def prepared(spec: ComparisonSpec, home: Path, journal: Journal) -> tuple[Corpus, dict[str, Any]]:
    """The corpus and the plan for all models, made or loaded. Raises every error that can be detected by now."""
    wanted = candidates(spec.models)
    budget = Budget(spec.match, spec.budget)
    begun = (home / PLAN).exists() and any(home.glob(f"*/{CONFIG}"))  # before the first training the plan may change
    if not begun:
        unpack(home, spec)
        for stale in home.glob(f"*.{MERGES}"):
            stale.unlink()
    modality = modality_of(spec.modality, "compare") if spec.modality else None
    packing = PackingStage(
        home / "data", spec.paths, DataConfig(), modality, (home, *spec.excluded), pack_of(spec.paths, home)
    )
    corpus = run_stage(packing, journal)
    if corpus.bytes("train") < LEAST:
        raise DataError(
            f"{corpus.bytes('train'):,} bytes to learn from are too few to compare models: give {LEAST:,} or more"
        )
    plan = plan_of(spec, home, begun)
    if not begun or not (home / HELD_OUT).exists():
        keep_held_out(spec, home, corpus, modality)
    for one in wanted:
        StopRequest.check()
        if one.name not in plan["models"]:
            plan_for(one, budget, corpus, spec, plan, home, journal)
    write_whole(home / PLAN, json.dumps(plan, indent=1).encode())
    return corpus, plan


def unpack(home: Path, spec: ComparisonSpec) -> None:
    """Remove data of a command that trained nothing, unless packed with the same modality: it is packed again."""
    index = home / "data" / INDEX
    with contextlib.suppress(OSError, ValueError, LookupError):
        if json.loads((home / PLAN).read_bytes())["modality"] == spec.lasting()["modality"]:
            return
    if not (home / CONFIG).exists():  # not in a run of `bytelm train`
        with contextlib.suppress(DataError):
            Corpus.open(index.parent)
            index.unlink()


def plan_of(spec: ComparisonSpec, home: Path, begun: bool) -> dict[str, Any]:
    """The present plan. Raises ConfigError if `home` contains another comparison."""
    path = home / PLAN
    lasting = spec.lasting() | {"held_out_fingerprint": fingerprint(spec.held_out) if spec.held_out else None}
    if not begun:
        return {**lasting, "models": {}, "speeds": {}, "rate": None}
    plan = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key, value in lasting.items() if plan[key] != value]
    differences = [f"{key} was {plan[key]!r}, now {lasting[key]!r}" for key in changed]
    if differences:
        raise ConfigError(f"{home} holds another comparison: {'; '.join(differences)}: give the same, or another --run")
    return plan


def plan_for(
    one: Candidate,
    budget: Budget,
    corpus: Corpus,
    spec: ComparisonSpec,
    plan: dict[str, Any],
    home: Path,
    journal: Journal,
) -> None:
    """Add one model to the plan."""
    journal.progress(f"planning: {one.name}", force=True)
    if budget.match == "time":
        plan["rate"] = plan["rate"] or rate_of(corpus, spec)
        budget = Budget(budget.match, budget.amount, plan["rate"])
    tokens = None
    if one.tokens:
        tokens = run_stage(TokenizerStage(home / f"{slug(one.name)}.{MERGES}", one.number, corpus), journal)
    mean = mean_of(one, corpus, tokens)
    found = planned(one, budget, corpus, mean, spec.modality)
    check_memory(found, memory(resolve(spec.device)).free)
    plan["models"][one.name] = found.mapping()
    plan["speeds"][one.name] = bytes_per_second(found.run(0, device=spec.device), found.mean)


def rate_of(corpus: Corpus, spec: ComparisonSpec) -> float:
    """FLOPs per second at which this machine trains a windowed byte Transformer."""
    (byte,) = candidates("byte-window")
    found = planned(byte, Budget("bytes", PROBED), corpus, 1.0, spec.modality)
    return TRAINING * found.costs.executed * bytes_per_second(found.run(0, device=spec.device), found.mean)


def keep_held_out(spec: ComparisonSpec, home: Path, corpus: Corpus, modality: Modality | None) -> None:
    """Choose the evaluated segments, from --held-out files or else the test split."""
    if spec.held_out:
        documents = (b"".join(document.pieces) for document in read(spec.held_out, modality))
    else:
        documents = (data.tobytes() for _, data in iterate_documents(corpus, "test"))
    size = modality.size if modality is not None else None
    grain = modality.grain if modality is not None else 1
    held_out.keep(home / HELD_OUT, held_out.stretches(documents, longest=size or held_out.LONGEST, grain=grain))


def slug(name: str, seed: int | None = None) -> str:
    """The folder of a model with one seed."""
    return name.replace(":", "-") + ("" if seed is None else f"-{seed}")


def run_all(spec: ComparisonSpec, home: Path, *, quiet: bool = False, dry: bool = False) -> Outcome:
    """Train and evaluate what is missing; `dry` only plans. It can be stopped by a signal and resumed.

    Raises DataError, UsageError, ConfigError, ResourceError and MissingExtraError before the first training; a later
    failure is reported, and the other models continue.
    """
    device, (_, others) = resolve(spec.device), listed(spec.models)
    foreign.check(others)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {home} ({error.strerror}): choose another place with --run") from error
    journal = Journal(home / METRICS, quiet)
    with StopRequest(), exclusive(home):
        try:
            corpus, plan = prepared(spec, home, journal)
            outcome = Outcome(plan, foreign=foreign.evaluated(others, home, device, journal, dry=dry) if others else [])
        except Interrupted as stopped:
            return Outcome({}, signal=stopped.signal)
        names = [one.name for one in candidates(spec.models)]
        for seed in range(spec.seeds):
            for name in names:
                run = home / slug(name, seed)
                if not (dry or outcome.signal is not None or (run / RESULT).exists()):
                    journal.say(f"{name}, seed {seed}:")
                    outcome.signal = trained(spec, home, name, seed, run, corpus, quiet, outcome)
        for seed in range(spec.seeds):
            found = [home / slug(name, seed) / RESULT for name in names]
            outcome.results += [json.loads(path.read_bytes()) for path in found if path.exists()]
    return outcome


def trained(
    spec: ComparisonSpec, home: Path, name: str, seed: int, run: Path, corpus: Corpus, quiet: bool, outcome: Outcome
) -> int | None:
    """One run in a separate process; returns the signal that stopped it, None if it finished or failed."""
    run.mkdir(exist_ok=True)
    if not (run / "data").exists():
        (run / "data").symlink_to(os.path.relpath(corpus.directory, run))
    merges = home / f"{slug(name)}.{MERGES}"
    if merges.exists():
        shutil.copyfile(merges, run / MERGES)
    job = {"home": str(home), "name": name, "seed": seed, "run": str(run), "device": spec.device, "quiet": quiet}
    command = [sys.executable, "-m", "bytelm.compare.worker", json.dumps(job)]
    (run / FAILED).unlink(missing_ok=True)
    with StopRequest() as stop:
        # In a separate process group, so that Ctrl-C reaches only this process, which forwards it once.
        process = subprocess.Popen(command, start_new_session=True)
        forwarded = False
        while process.poll() is None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop.received is not None and not forwarded:
                    process.send_signal(stop.received)
                    forwarded = True
    code = process.returncode
    if stop.received is not None:
        return stop.received
    if code:
        path = run / FAILED
        reason = path.read_text(encoding="utf-8").strip() if path.exists() else died(code)
        outcome.failed[f"{name}, seed {seed}"] = reason
    return None


def died(code: int) -> str:
    """Why a process ended that left no failed.txt."""
    return f"it was killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"


def expected(outcome: Outcome, spec: ComparisonSpec) -> tuple[list[str], list[list[str]]]:
    """The plan as a table: a head, one row per model, and the total time."""
    plan = outcome.plan
    head = ["model", "parameters", "+ tables", "MFLOP/byte", "to learn", "patch", "memory", "time, about"]
    found: list[list[str]] = []
    whole = 0.0
    for name in (one.name for one in candidates(spec.models)):
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
