"""New thresholds for a run's entropy model (`bytelm calibrate`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bytelm.checkpoint.assemble import Recipe, load
from bytelm.config import build
from bytelm.data.corpora import open_corpus
from bytelm.data.corpus import Split
from bytelm.data.selection import sample_evenly
from bytelm.errors import UsageError
from bytelm.evaluate.patches import lengths_by_kind, mean_length
from bytelm.training.journal import Journal
from bytelm.training.stages.base import run_stage
from bytelm.training.stages.thresholds import ThresholdStage
from bytelm.transfer import HOST

CHECKED = 1 << 19  # held-out bytes for the reported lengths


@dataclass(frozen=True)
class Calibration:
    """Thresholds in nats, and the mean patch length in bytes on held-out bytes, by file type."""

    rule: str
    threshold: float | None
    relative_threshold: float | None
    mean_length: float
    realised: float
    by_kind: dict[str, float]

    def mapping(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def recalibrate(
    run: str | Path, size: float, rule: str | None = None, device: torch.device = HOST, quiet: bool = True
) -> Calibration:
    """Thresholds for a mean patch of `size` bytes, by the run's rule or another. Raises UsageError and Interrupted."""
    run = Path(run)
    loaded = load(run, device)
    recipe = build(Recipe, loaded.state["recipe"], str(loaded.checkpoint))
    if not recipe.uses_entropy_model:
        raise UsageError(f"{run} has no entropy model to calibrate: it was not trained on entropy patches")
    corpus = open_corpus(run / "data")
    entropy_model: Any = loaded.model.get_submodule("patcher.entropy_model")
    patching: Any = recipe.patching
    unset = replace(
        patching, target_mean_length=size, rule=rule or patching.rule, threshold=None, relative_threshold=None
    )
    stage = ThresholdStage(run / "recipe.toml", replace(recipe, patching=unset), entropy_model, corpus, kept=False)
    found: Any = run_stage(stage, Journal(None, quiet)).patching
    split: Split = next(s for s in ("valid", "test", "train") if corpus.bytes(s))
    kinds = lengths_by_kind(found.build(entropy_model), sample_evenly(corpus, split, CHECKED))
    return Calibration(
        found.rule,
        found.threshold if found.rule != "relative" else None,
        found.relative_threshold if found.rule != "threshold" else None,
        size,
        mean_length(sum(kinds.values(), Counter[int]())),
        {kind: mean_length(lengths) for kind, lengths in sorted(kinds.items()) if lengths},
    )
