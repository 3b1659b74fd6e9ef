"""Before the first training of a sweep: the data is packed, the trials are drawn, and their configurations checked.

HOME/data            the corpus, packed once
HOME/valid.bin       the segments that decide, of the validation split; HOME/test.bin: those of the test split
HOME/plan.json       the specification, and the trials with their whole configurations
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bytelm.compare import held_out
from bytelm.compare.prepare import forget_data, has_begun
from bytelm.config import build, to_mapping
from bytelm.data.corpus import Corpus, Split, iterate_documents
from bytelm.data.files import write_whole
from bytelm.data.packed import pack_of
from bytelm.errors import ConfigError, UsageError
from bytelm.sweep.space import Axis, Range, Trial, axes, drawn, grid, show
from bytelm.training.config import RunConfig
from bytelm.training.journal import Journal
from bytelm.training.stages.base import run_stage
from bytelm.training.stages.packing import PackingStage

PLAN, VALID, TEST = "plan.json", "valid.bin", "test.bin"
DEFAULT_TRIALS = 16
SHARE = 3  # halving: one of so many trials goes on, with so many times the budget
RUNGS = 3  # halving: at most

Search = Literal["grid", "random", "halving"]
Configure = Callable[[Trial], RunConfig]
"""The configuration of a trial."""


@dataclass(frozen=True)
class SweepSpec:
    """What is swept. All but `trials`, `seeds` and `device` is fixed for the life of a sweep."""

    paths: Sequence[str]
    over: Sequence[str]
    search: Search = "grid"
    trials: int | None = None
    seeds: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: give at least 1")
        if self.trials is not None and self.trials < 1:
            raise UsageError(f"--trials {self.trials}: give at least 1")
        if self.trials is not None and self.search == "grid":
            raise UsageError(f"--trials {self.trials}: a grid has as many as there are combinations: --search random")

    def drawn(self) -> list[Trial]:
        """The trials. Raises UsageError."""
        found = axes(self.over)
        if self.search == "grid" or (self.search == "halving" and self.trials is None and not ranges(found)):
            return grid(found)
        return drawn(found, self.trials or DEFAULT_TRIALS)


def ranges(found: Sequence[Axis]) -> bool:
    """Whether a key has a range."""
    return any(isinstance(one, Range) for one in found)


@dataclass(frozen=True)
class Plan:
    """What the workers read: the configuration that trials change, what each sets, and each as a whole."""

    paths: list[str]
    search: Search
    over: list[str]
    base: dict[str, Any]
    trials: list[dict[str, Any]]
    configs: list[dict[str, Any]]

    def config(self, trial: int, **train: Any) -> RunConfig:
        """The configuration of a trial, with further settings of [train]."""
        tables = self.configs[trial]
        return build(RunConfig, {**tables, "train": {**tables["train"], **train}}, f"trial {trial}")

    def write(self, home: Path) -> None:
        """Keep it."""
        write_whole(home / PLAN, json.dumps(self.__dict__, indent=1).encode())

    @classmethod
    def read(cls, home: Path) -> Plan:
        """The inverse of `write`."""
        return cls(**json.loads((home / PLAN).read_bytes()))


def planned(spec: SweepSpec, configure: Configure, home: Path) -> Plan:
    """The plan: a new one, or the kept one with the trials that are new. Raises ConfigError, UsageError."""
    base = to_mapping(configure({}))
    trials = [dict(trial) for trial in spec.drawn()]
    kept = Plan.read(home) if has_begun(home) else None
    if kept is None:
        unpack(home, base)
    else:
        was = {"paths": kept.paths, "search": kept.search, **kept.base}
        now = {"paths": list(map(str, spec.paths)), "search": spec.search, **base}
        if said := difference(was, now):
            raise ConfigError(f"{home} holds another sweep: {said}: give the same, or another --run")
        trials = [*kept.trials, *(trial for trial in trials if trial not in kept.trials)]
    configs: list[dict[str, Any]] = []
    for number, trial in enumerate(trials):
        if kept is not None and number < len(kept.trials):
            configs.append(kept.configs[number])
            continue
        try:
            config = configure(trial)
        except ConfigError as error:
            raise ConfigError(f"trial {number}, {shown(trial)}: {error}") from None
        if config.data != configure({}).data or config.modality != configure({}).modality:
            raise ConfigError(f"trial {number}, {shown(trial)}: changes the data, which all trials share")
        configs.append(to_mapping(config))
    if spec.search == "halving":
        for config in configs:
            if config["train"].get("minutes", "none") != "none":
                raise UsageError("--search halving needs a budget in --bytes or --steps, which is divided exactly")
    return Plan(list(map(str, spec.paths)), spec.search, list(spec.over), base, trials, configs)


def unpack(home: Path, base: Mapping[str, Any]) -> None:
    """Have data packed again that was packed with other options for a sweep that trained nothing."""
    if (home / PLAN).exists():
        was = Plan.read(home).base
        if any(was.get(table) != base.get(table) for table in ("data", "modality")):
            forget_data(home)
            for name in (VALID, TEST):
                (home / name).unlink(missing_ok=True)


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that differs, as text."""
    for table in now:
        old, new = was.get(table), now[table]
        if old != new:
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
                return f"{table}.{key} was {old.get(key)!r}, now {new.get(key)!r}"
            return f"{table} was {old!r}, now {new!r}"
    return None


def shown(trial: Trial) -> str:
    """A trial as people read it."""
    return ", ".join(f"{key}={show(value)}" for key, value in trial.items())


def prepared(spec: SweepSpec, configure: Configure, home: Path, journal: Journal) -> tuple[Corpus, Plan]:
    """The corpus and the plan, made or loaded. Raises every error that can be detected by now."""
    plan, config = planned(spec, configure, home), configure({})
    if config.mix:
        raise UsageError("--mix: a sweep is over one source: leave it out")
    modality = config.modality.build() if config.modality is not None else None
    packing = PackingStage(home / "data", spec.paths, config.data, modality, (home,), pack_of(spec.paths, home))
    corpus = run_stage(packing, journal)
    splits: dict[str, Split] = {VALID: "valid", TEST: "test"}
    for name, split in splits.items():
        if not (home / name).exists():
            longest = (modality.size if modality is not None else None) or held_out.LONGEST
            documents = (data.tobytes() for _, data in iterate_documents(corpus, split))
            grain = modality.grain if modality is not None else 1
            held_out.keep(home / name, held_out.stretches(documents, longest=longest, grain=grain))
    plan.write(home)
    return corpus, plan
