"""From a budget to models of the right size: what each is made of, what it will cost, and whether it can be had at all.

    --match flops   the same operations a byte, and in all            budget: FLOPs of a training, C = 3 · F · D
    --match time    the same seconds on this machine                  budget: seconds; shapes as for the FLOPs it can do
    --match bytes   the same bytes, and the same parameters           budget: bytes, D

F, the operations of a forward pass per byte, and D, the bytes learnt from, go up together: a Transformer of N
parameters has F = 2 N, and D is RATIO · N, but at the most EPOCHS times the training bytes there are. Operations are
those that are executed, entropy models and hash tables among them; parameters are those beside embedding tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bytelm.compare.candidates import Candidate, nearest
from bytelm.config import build
from bytelm.data.bpe import Bpe
from bytelm.data.convert import modality_of
from bytelm.data.corpus import Corpus
from bytelm.data.selection import spread
from bytelm.errors import ConfigError, ResourceError
from bytelm.evaluate.costs import Costs, costs
from bytelm.evaluate.patches import realised
from bytelm.training.config import RunConfig
from bytelm.training.estimate import TRAINING
from bytelm.training.memory import predict
from bytelm.units import show_bytes, show_count

Match = Literal["flops", "time", "bytes"]

RATIO = 30  # bytes that a parameter learns from: between what suits models with and without large tables (docs/log.md)
EPOCHS = 4  # times that a byte is read at the most: more teach little (Muennighoff et al. 2023, arXiv 2305.16264)
WINDOW = 1024  # bytes that are read in a row
STEP, LARGE_STEP = 4096, 65536  # bytes of a step, and of one where there are many
STEPS = 2048  # that a training has, before they are made larger
LONGEST = 4  # steps that one document may be as long as to be read in a row, where all have one size
SAMPLE = 1 << 20  # bytes on which the size of patches is counted
OFF = 1.5  # by how much a model may miss its cost before it counts as one that cannot be had


@dataclass(frozen=True)
class Planned:
    """A model in the size that the budget gives it. `mean`: bytes of a patch or token. `bytes`: None to match time."""

    name: str
    config: dict[str, Any]
    mean: float
    costs: Costs
    bytes: int | None
    memory: int

    def mapping(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Planned:
        """The same back."""
        fields: dict[str, Any] = {**mapping, "costs": Costs(**mapping["costs"])}
        return cls(**fields)

    def run(self, seed: int, **train: Any) -> RunConfig:
        """Its training under one seed."""
        return built(self.config, seed=seed, **train)


def built(tables: Mapping[str, Any], **train: Any) -> RunConfig:
    """The configuration of tables, and of more for [train]."""
    return build(RunConfig, {**tables, "train": {**tables.get("train", {}), **train}}, "compare")


@dataclass(frozen=True)
class Budget:
    """What is the same for all. `rate`: operations a second, for budgets of time."""

    match: Match
    amount: float
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not (self.amount > 0 and math.isfinite(self.amount)):
            raise ConfigError(f"--budget {self.amount}: must be above 0")

    @property
    def what(self) -> str:
        """What one byte costs."""
        return "parameters" if self.match == "bytes" else "FLOPs a byte"

    def goal(self, train_bytes: int) -> tuple[float, float]:
        """What a model may cost (operations a byte, or parameters to match bytes), and the bytes it learns from."""
        if self.match == "bytes":
            return self.amount / RATIO, self.amount
        operations = self.amount * (self.rate if self.match == "time" else 1.0)
        cost = math.sqrt(operations / (TRAINING * RATIO / 2))
        bytes, most = operations / (TRAINING * cost), float(EPOCHS * train_bytes)
        return (cost, bytes) if bytes <= most else (operations / (TRAINING * most), most)

    def needed(self, cost: float, train_bytes: int) -> float:
        """The amount that lets a model cost so much: `goal` the other way round."""
        if self.match == "bytes":
            return cost * RATIO
        operations = TRAINING * cost * min(RATIO / 2 * cost, EPOCHS * train_bytes)
        return operations / (self.rate if self.match == "time" else 1.0)

    def counted(self, found: Costs) -> float:
        """What a model costs, in what the budget limits."""
        return float(found.parameters - found.tables) if self.match == "bytes" else found.executed


def mean_of(candidate: Candidate, corpus: Corpus, tokens: Bpe | None) -> float:
    """Bytes of a patch in training documents, or of one of `tokens`, where the entrant reads those."""
    tables = candidate.tables(64, 0)
    patching = tables.get("patching", {})
    sample = [data for _, data in spread(corpus, "train", SAMPLE)]
    if tokens is not None:
        return sum(map(len, sample)) / sum(len(tokens.encode(data.tobytes())) for data in sample)
    if patching and "target_mean_length" not in patching:
        config = built(tables, steps=1).patching
        assert config is not None
        return realised(config.build(), [("", data) for data in sample])[""]
    return patching.get("target_mean_length") or float(
        built(tables, steps=1).recipe.build_for_counting().patch_size or 1
    )


def planned(
    candidate: Candidate, budget: Budget, corpus: Corpus, mean: float, modality: Mapping[str, Any] | None
) -> Planned:
    """An entrant in the size that the budget gives it.

    Raises ConfigError where no shape costs about as much as it may, ResourceError where the memory does not suffice.
    """
    goal, bytes = budget.goal(corpus.bytes("train"))
    window = window_of(modality)
    ids = max(1, round(window / mean)) if candidate.tokens else window
    rows = max(1, round(step_of(bytes) / window))

    def tables(width: int, depth_offset: int) -> dict[str, Any]:
        found = candidate.tables(width, depth_offset)
        train = {"context_length": ids, "batch": rows, "min_lr_ratio": 0.0, "sample_bytes": 0, **found["train"]}
        return {**found, "train": train} | ({"modality": dict(modality)} if modality else {})

    def counted(width: int, depth_offset: int) -> Costs:
        return costs(built(tables(width, depth_offset), steps=1).recipe, ids, mean)

    size = nearest(lambda width, depth_offset: budget.counted(counted(width, depth_offset)), goal)
    found, config = counted(*size), tables(*size)
    cost = budget.counted(found)
    if not 1 / OFF < cost / goal < OFF:
        needed = budget.needed(cost, corpus.bytes("train"))
        raise ConfigError(
            f"{candidate.name}: this budget gives it {show_count(goal)} {budget.what}, and its nearest shape has "
            f"{show_count(cost)}: give {'more' if cost > goal else 'less'} --budget ({needed:.1e} "
            "suits it), or leave it out of --models"
        )
    if budget.match == "flops":
        bytes = budget.amount / (TRAINING * found.executed)
    config["train"] |= limits(budget, bytes, window * rows)
    run = built(config)
    memory = predict(run.recipe.build_for_counting(), run.train, mean).peak
    return Planned(candidate.name, config, mean, found, run.train.bytes, memory)


def limits(budget: Budget, bytes: float, step: int) -> dict[str, Any]:
    """When a training ends, and how long it warms up; `step`: bytes of one."""
    warmup = {"warmup_steps": max(1, min(100, round(bytes / step) // 20))}
    return warmup | ({"minutes": budget.amount / 60} if budget.match == "time" else {"bytes": max(step, round(bytes))})


def step_of(bytes: float) -> int:
    """Bytes of a step of a training on so many: of STEP, doubled as long as STEPS of them remain.

    Small steps learn more from few bytes; of long trainings they would leave a GPU waiting for the next launch.
    """
    found = STEP
    while found < LARGE_STEP and bytes >= STEPS * 2 * found:
        found *= 2
    return found


def window_of(modality: Mapping[str, Any] | None) -> int:
    """Bytes that are read in a row: a document of a modality whose documents have one size, and its end; or WINDOW."""
    if modality is None:
        return WINDOW
    size = modality_of(modality, "compare").size
    return WINDOW if size is None or size + 1 > LONGEST * STEP else size + 1


def check_memory(planned: Planned, available: int) -> None:
    """Raises ResourceError for a model whose training takes more than there is."""
    if planned.memory > available:
        raise ResourceError(
            f"{planned.name}: a step takes {show_bytes(planned.memory)} of memory, and {show_bytes(available)} are "
            "free: give less --budget"
        )
