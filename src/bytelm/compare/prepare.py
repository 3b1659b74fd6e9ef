"""Before the first training: the data is packed, the held-out bytes chosen, and each model sized to each budget.

HOME/data            the corpus, packed once, with boundaries and tokens
HOME/held-out.bin    the evaluated segments
HOME/plan.json       the specification, and each model sized to the budget
HOME/1e12/           with several budgets: the same of each, but the corpus
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bytelm.compare import held_out, laws
from bytelm.compare.candidates import Candidate, candidates
from bytelm.compare.cells import CELLS
from bytelm.compare.plan import Budget, Match, UnsuitedError, check_memory, mean_of, planned
from bytelm.compare.worker import HELD_OUT, PLAN
from bytelm.data.claims import held_by
from bytelm.data.convert import modality_of, read
from bytelm.data.corpus import INDEX, Corpus, iterate_documents
from bytelm.data.files import write_whole
from bytelm.data.options import DataConfig
from bytelm.data.packed import pack_of
from bytelm.data.sources import expanded, fingerprint
from bytelm.device import AUTO, memory, resolve
from bytelm.errors import ConfigError, DataError
from bytelm.training.estimate import TRAINING, bytes_per_second
from bytelm.training.journal import Journal
from bytelm.training.stages.base import run_stage
from bytelm.training.stages.packing import PackingStage
from bytelm.training.stages.tokens import MERGES, TokenizerStage
from bytelm.training.stop import StopRequest
from bytelm.units import show_power

CONFIG = "config.toml"  # of a run that was started
PROBED = 1e7  # training bytes of the model by which the machine is timed
LEAST = 1 << 16  # training bytes
MOST_RATES = 9  # powers of two from 1/16 to 16
SEVERAL = "several"  # the budget of a plan above those of several budgets


@dataclass(frozen=True)
class ComparisonSpec:
    """What is compared. `paths`, `held_out`, `match` and `modality` are fixed for the life of a comparison.

    So is whether it has one budget or several: more budgets can be added to several. `rates`: learning rates tried for
    each family at each budget (`rates`).
    """

    paths: Sequence[str]
    models: str
    match: Match
    budgets: tuple[float, ...]
    seeds: int = 1
    held_out: Sequence[str] = ()
    modality: Mapping[str, Any] | None = None
    device: str = AUTO
    rates: int = 1
    fit: bool = False
    """Scaling laws are fitted to the results, which takes several budgets."""
    several: bool = False
    """Whether the comparison has several budgets, though this names one of them."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"--seeds {self.seeds}: give at least 1")
        if not 1 <= self.rates <= MOST_RATES:
            raise ConfigError(f"--rates {self.rates}: give 1 to {MOST_RATES}")
        if self.fit:
            laws.check(self.budgets, self.match)
        for budget in self.budgets:
            if not (budget > 0 and math.isfinite(budget)):
                raise ConfigError(f"--budget {budget}: must be above 0 and finite")
        if len(set(map(show_power, self.budgets))) < len(self.budgets):
            raise ConfigError(f"--budget {', '.join(map(show_power, self.budgets))}: names one twice")

    @property
    def is_several(self) -> bool:
        """Whether budgets have folders of their own."""
        return self.several or len(self.budgets) > 1

    @property
    def unit(self) -> str:
        """What a budget is counted in."""
        return {"flops": "FLOPs", "time": "seconds", "bytes": "bytes"}[self.match]

    @property
    def excluded(self) -> list[Path]:
        """Held-out files, which are not trained on where they are among `paths`."""
        return [Path(file) for path in self.held_out for file in expanded(str(path))]

    def lasting(self) -> dict[str, Any]:
        """The fixed fields, as JSON."""
        paths = {"paths": list(map(str, self.paths)), "held_out": list(map(str, self.held_out))}
        budget = SEVERAL if self.is_several else self.budgets[0]
        return {**paths, "match": self.match, "budget": budget, "modality": dict(self.modality or {}) or None}


@dataclass(frozen=True)
class Place:
    """One budget of a comparison, prepared: its specification, its folder, and the plan of its models."""

    spec: ComparisonSpec
    home: Path
    plan: dict[str, Any]


def places(spec: ComparisonSpec, home: Path) -> list[tuple[ComparisonSpec, Path]]:
    """A specification and a folder for each budget, from the smallest to the largest."""
    if not spec.is_several:
        return [(spec, home)]
    return [
        (replace(spec, budgets=(budget,), fit=False, several=False), home / show_power(budget))
        for budget in sorted(spec.budgets)
    ]


def joining(spec: ComparisonSpec, home: Path) -> ComparisonSpec:
    """The same as part of the comparison in `home`: where that has several budgets, one may be named alone."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        if has_begun(home) and json.loads((home / PLAN).read_bytes())["budget"] == SEVERAL:
            return replace(spec, several=True)
    return spec


def prepared(spec: ComparisonSpec, home: Path, journal: Journal) -> tuple[Corpus, list[Place]]:
    """The corpus and the plans for all models, made or loaded. Raises every error that can be detected by now."""
    wanted, parts = candidates(spec.models), places(spec, home)
    begun = has_begun(home)
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
    whole = plan_of(spec, home, begun)
    if not begun or not (home / HELD_OUT).exists():
        held_out.keep(home / HELD_OUT, held_out_of(spec, corpus))
    if spec.is_several:
        write_whole(home / PLAN, json.dumps(whole, indent=1).encode())
    found: list[Place] = []
    for one, place in parts:
        plan = whole if place == home else opened(one, place, home)
        fill(one, wanted, plan, corpus, place, home, journal)
        found.append(Place(one, place, plan))
    for one in wanted:
        reasons = [place.plan["unsuited"].get(one.name) for place in found]
        if all(reasons):
            raise ConfigError(reasons[-1])
    return corpus, found


def has_begun(home: Path) -> bool:
    """Whether a training has begun, or is beginning; before the first one the plan may change."""
    configs = [*home.glob(f"*/{CONFIG}"), *home.glob(f"*/*/{CONFIG}")]
    return (home / PLAN).exists() and (bool(configs) or held_by(home / CELLS) is not None)


def opened(spec: ComparisonSpec, place: Path, home: Path) -> dict[str, Any]:
    """The folder of one budget of several, made or found, and its plan."""
    place.mkdir(exist_ok=True)
    if not (place / "data").exists():
        (place / "data").symlink_to("../data")
    write_whole(place / HELD_OUT, (home / HELD_OUT).read_bytes())
    return plan_of(spec, place, has_begun(home) and (place / PLAN).exists())


def fill(
    spec: ComparisonSpec,
    wanted: Sequence[Candidate],
    plan: dict[str, Any],
    corpus: Corpus,
    place: Path,
    home: Path,
    journal: Journal,
) -> None:
    """Add to the plan of one budget the models that are wanted and not in it, and write it to its folder.

    "unsuited" in it says of models why no size of theirs suits this budget.
    """
    before = json.dumps(plan)
    for one in wanted:
        StopRequest.check()
        if one.name not in plan["models"] and one.name not in plan["unsuited"]:
            try:
                plan_for(one, spec, corpus, plan, home, journal)
            except UnsuitedError as error:  # perhaps only at this budget of several
                plan["unsuited"][one.name] = str(error)
    if json.dumps(plan) != before or not (place / PLAN).exists():
        write_whole(place / PLAN, json.dumps(plan, indent=1).encode())


def unpack(home: Path, spec: ComparisonSpec) -> None:
    """Remove data of a command that trained nothing, unless packed with the same modality: it is packed again."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        if json.loads((home / PLAN).read_bytes())["modality"] == spec.lasting()["modality"]:
            return
    forget_data(home)


def forget_data(home: Path) -> None:
    """Have the data of `home` packed again, unless it is that of a run of `bytelm train`."""
    index = home / "data" / INDEX
    if not (home / CONFIG).exists():
        with contextlib.suppress(DataError):
            Corpus.open(index.parent)
            index.unlink()


def plan_of(spec: ComparisonSpec, home: Path, begun: bool) -> dict[str, Any]:
    """The present plan. Raises ConfigError if `home` contains another comparison."""
    path = home / PLAN
    known = {"held_out_fingerprint": fingerprint(spec.held_out) if spec.held_out else None}
    lasting = spec.lasting() | known
    if not begun:
        return {**lasting, "models": {}, "unsuited": {}, "speeds": {}, "rate": None}
    plan = {"unsuited": {}, **json.loads(path.read_text(encoding="utf-8"))}
    asked = {key: plan[key] for key in lasting}
    if asked != lasting and asked | known == lasting and held_out.kept(home / HELD_OUT) == held_out_of(spec):
        plan |= known  # a copy of the held-out files has other times
    changed = [key for key, value in lasting.items() if plan[key] != value]
    differences = [f"{key} was {plan[key]!r}, now {lasting[key]!r}" for key in changed]
    if differences:
        raise ConfigError(f"{home} holds another comparison: {'; '.join(differences)}: give the same, or another --run")
    return plan


def plan_for(
    one: Candidate, spec: ComparisonSpec, corpus: Corpus, plan: dict[str, Any], home: Path, journal: Journal
) -> None:
    """Add one model to the plan of one budget."""
    budget = Budget(spec.match, spec.budgets[0])
    journal.progress(f"planning: {one.name}", force=True)
    if budget.match == "time":
        plan["rate"] = plan["rate"] or rate_of(corpus, spec)
        budget = Budget(budget.match, budget.amount, plan["rate"])
    tokens = None
    if one.tokens:
        tokens = run_stage(TokenizerStage(home / f"{one.tokenizer}.{MERGES}", one.number, corpus), journal)
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


def held_out_of(spec: ComparisonSpec, corpus: Corpus | None = None) -> list[held_out.Stretch]:
    """The evaluated segments, from --held-out files or else the test split of `corpus`."""
    modality = modality_of(spec.modality, "compare") if spec.modality else None
    if corpus is None or spec.held_out:
        documents = (b"".join(document.pieces) for document in read(spec.held_out, modality))
    else:
        documents = (data.tobytes() for _, data in iterate_documents(corpus, "test"))
    size = modality.size if modality is not None else None
    grain = modality.grain if modality is not None else 1
    return held_out.stretches(documents, longest=size or held_out.LONGEST, grain=grain)


def slug(name: str) -> str:
    """The name of a model as part of a path."""
    return name.replace(":", "-").replace("@", "-at-")
