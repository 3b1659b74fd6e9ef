"""From a budget to models of the right size: the recipe and cost of each, and whether the budget allows it.

    --match flops   equal FLOPs per byte and in total        budget: training FLOPs, C = 3 · F · D
    --match time    equal training time on this machine      budget: seconds; shapes for the FLOPs possible in that time
    --match bytes   equal training bytes and parameters      budget: bytes, D

F (forward FLOPs per byte) and D (training bytes) grow together: a Transformer of N parameters has F = 2 N, and D is
RATIO · N, at most EPOCHS times the training split, or ONCE with n-gram tables. FLOPs are as executed, entropy models
and hash tables included; parameters are non-embedding parameters.
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
from bytelm.data.selection import sample_evenly
from bytelm.errors import ConfigError, ResourceError
from bytelm.evaluate.costs import Costs, costs
from bytelm.evaluate.patches import realised
from bytelm.training.config import RunConfig
from bytelm.training.estimate import EPOCHS, ONCE, TRAINING
from bytelm.training.memory import predict
from bytelm.units import show_bytes, show_count

Match = Literal["flops", "time", "bytes"]

RATIO = 30  # training bytes per parameter: between the optima with and without large tables (docs/log.md)
WINDOW = 1024  # context length in bytes
STEP, LARGE_STEP = 4096, 65536  # smallest and largest bytes per step
STEPS = 2048  # steps per training before they are made larger
LONGEST = 4  # a document may be this many steps long to be read whole, if all have one size
SAMPLE = 1 << 20  # bytes on which the mean patch length is measured
OFF = 1.5  # largest ratio of cost to goal, or the reverse


class UnsuitedError(ConfigError):
    """A model none of whose sizes suits a budget."""


@dataclass(frozen=True)
class Planned:
    """A candidate sized to the budget. `mean`: bytes per patch or token. `bytes`: None to match time."""

    name: str
    config: dict[str, Any]
    mean: float
    costs: Costs
    bytes: int | None
    memory: int

    def mapping(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Planned:
        """The inverse of `mapping`."""
        fields: dict[str, Any] = {**mapping, "costs": Costs(**mapping["costs"])}
        return cls(**fields)

    def run(self, seed: int, factor: float = 1.0, **train: Any) -> RunConfig:
        """The configuration of its training with one seed, at `factor` times its learning rate."""
        return built(self.at_rate(factor), seed=seed, **train)

    def at_rate(self, factor: float) -> dict[str, Any]:
        """Its configuration with another learning rate."""
        if factor == 1:
            return self.config
        rate = factor * built(self.config).train.learning_rate
        return {**self.config, "train": {**self.config["train"], "learning_rate": rate}}


def built(tables: Mapping[str, Any], **train: Any) -> RunConfig:
    """The configuration from tables, with further settings of [train]."""
    return build(RunConfig, {**tables, "train": {**tables.get("train", {}), **train}}, "compare")


@dataclass(frozen=True)
class Budget:
    """What is equal for all candidates. `rate`: FLOPs per second, for time budgets."""

    match: Match
    amount: float
    rate: float = 1.0

    @property
    def what(self) -> str:
        """The unit of `goal`."""
        return "parameters" if self.match == "bytes" else "FLOPs per byte"

    def goal(self, most: float, ratio: float = RATIO) -> tuple[float, float]:
        """The cost of a model (FLOPs per byte, or parameters to match bytes), and its training bytes.

        `most`: training bytes at the most (`most_bytes`). `ratio`: training bytes per parameter.
        """
        if self.match == "bytes":
            return self.amount / ratio, self.amount
        operations = self.amount * (self.rate if self.match == "time" else 1.0)
        cost = math.sqrt(operations / (TRAINING * ratio / 2))
        bytes = operations / (TRAINING * cost)
        return (cost, bytes) if bytes <= most else (operations / (TRAINING * most), float(most))

    def needed(self, cost: float, most: float, ratio: float = RATIO) -> float:
        """The budget amount for a cost: the inverse of `goal`."""
        if self.match == "bytes":
            return cost * ratio
        operations = TRAINING * cost * min(ratio / 2 * cost, most)
        return operations / (self.rate if self.match == "time" else 1.0)

    def counted(self, found: Costs) -> float:
        """A model's cost in the unit of `goal`."""
        return float(found.parameters - found.tables) if self.match == "bytes" else found.executed


def most_bytes(candidate: Candidate, train_bytes: int) -> int:
    """The bytes that a model of the family is trained on at the most, of so many different ones."""
    return (ONCE if candidate.family.grown(0.0) else EPOCHS) * train_bytes


def mean_of(candidate: Candidate, corpus: Corpus, tokens: Bpe | None) -> float:
    """Mean bytes per patch, or per token, in training documents."""
    tables = candidate.tables(64, 0)
    patching = tables.get("patching", {})
    sample = [data for _, data in sample_evenly(corpus, "train", SAMPLE)]
    if tokens is not None:
        return sum(map(len, sample)) / sum(len(tokens.encode(data.tobytes())) for data in sample)
    if patching and "target_mean_length" not in patching:
        config = built(tables, steps=1).patching
        assert config is not None
        return realised(config.build(), [("", data) for data in sample])[""]
    if "target_mean_length" in patching:
        return patching["target_mean_length"]
    model = built(tables, steps=1).recipe.build_for_counting()
    return float(model.patch_size or model.target_patch or 1)


def planned(
    candidate: Candidate, budget: Budget, corpus: Corpus, mean: float, modality: Mapping[str, Any] | None
) -> Planned:
    """A candidate sized to the budget. Raises UnsuitedError if no shape comes near its cost."""
    ratio = candidate.ratio or RATIO
    most = most_bytes(candidate, corpus.bytes("train"))
    goal, bytes = budget.goal(most, ratio)
    window = window_of(modality)
    ids = max(1, round(window / mean)) if candidate.tokens else window
    rows = max(1, round(step_of(bytes) / window))

    def tables(width: int, depth_offset: int) -> dict[str, Any]:
        found = candidate.tables(width, depth_offset, bytes)
        train = {"context_length": ids, "batch": rows, "sample_bytes": 0, **found["train"]}
        return {**found, "train": train} | ({"modality": dict(modality)} if modality else {})

    def counted(width: int, depth_offset: int) -> Costs:
        return costs(built(tables(width, depth_offset), steps=1).recipe, ids, mean)

    size = nearest(lambda width, depth_offset: budget.counted(counted(width, depth_offset)), goal)
    found, config = counted(*size), tables(*size)
    cost = budget.counted(found)
    if not 1 / OFF < cost / goal < OFF:
        needed = budget.needed(cost, most, ratio)
        raise UnsuitedError(
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
    """The budget and warm-up of a training; `step`: bytes per step."""
    warmup = {"warmup_steps": max(1, min(100, round(bytes / step) // 20))}
    return warmup | ({"minutes": budget.amount / 60} if budget.match == "time" else {"bytes": max(step, round(bytes))})


def step_of(bytes: float) -> int:
    """Bytes per step: STEP, doubled as long as STEPS of them remain.

    Small steps learn more from few bytes; in long trainings they would make a GPU launch-bound.
    """
    found = STEP
    while found < LARGE_STEP and bytes >= STEPS * 2 * found:
        found *= 2
    return found


def window_of(modality: Mapping[str, Any] | None) -> int:
    """Context length: a document and its EOS for a modality whose documents have one size, else WINDOW."""
    if modality is None:
        return WINDOW
    size = modality_of(modality, "compare").size
    return WINDOW if size is None or size + 1 > LONGEST * STEP else size + 1


def check_memory(planned: Planned, available: int) -> None:
    """Raises ResourceError if a training step needs more memory than is available."""
    if planned.memory > available:
        raise ResourceError(
            f"{planned.name}: a step takes {show_bytes(planned.memory)} of memory, and {show_bytes(available)} are "
            "free: give less --budget"
        )
