"""Other thresholds for a trained run's entropy model: what `bytelm calibrate` answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bytelm.checkpoint.assemble import Recipe, load
from bytelm.config import build
from bytelm.data.corpus import Corpus, Split
from bytelm.data.selection import spread
from bytelm.errors import UsageError
from bytelm.evaluate.patches import lengths_by_kind, mean_size
from bytelm.train.journal import Journal
from bytelm.train.stages.base import run_stage
from bytelm.train.stages.thresholds import ThresholdStage
from bytelm.transfer import HOST

CHECKED = 1 << 19  # held-out bytes that the sizes are reported on


@dataclass(frozen=True)
class Calibration:
    """Thresholds in nats, and the mean patch size in bytes that they give on held-out bytes, by kind of file."""

    rule: str
    threshold: float | None
    rise: float | None
    mean_size: float
    realised: float
    by_kind: dict[str, float]

    def mapping(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def recalibrate(
    run: str | Path, size: float, rule: str | None = None, device: torch.device = HOST, quiet: bool = True
) -> Calibration:
    """Find the thresholds for a mean patch of `size` bytes, in the run's own rule or another.

    Raises UsageError for a run without an entropy model, and Interrupted.
    """
    run = Path(run)
    loaded = load(run, device)
    recipe = build(Recipe, loaded.state["recipe"], str(loaded.checkpoint))
    if not recipe.scored:
        raise UsageError(
            f"{run} has no entropy model whose thresholds could be found: it was not trained on entropy patches"
        )
    corpus = Corpus.open(run / "data")
    scorer: Any = loaded.model.get_submodule("patcher.scorer")
    patching: Any = recipe.patching
    unset = replace(patching, mean_size=size, rule=rule or patching.rule, threshold=None, rise=None)
    stage = ThresholdStage(run / "recipe.toml", replace(recipe, patching=unset), scorer, corpus, kept=False)
    found: Any = run_stage(stage, Journal(None, quiet)).patching
    split: Split = next(s for s in ("valid", "test", "train") if corpus.bytes(s))
    kinds = lengths_by_kind(found.build(scorer), spread(corpus, split, CHECKED))
    return Calibration(
        found.rule,
        found.threshold if found.rule != "rise" else None,
        found.rise if found.rule != "threshold" else None,
        size,
        mean_size(sum(kinds.values(), Counter[int]())),
        {kind: mean_size(lengths) for kind, lengths in sorted(kinds.items()) if lengths},
    )
