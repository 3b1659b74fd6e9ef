"""Other thresholds for a trained run's scorer: what `bytelm calibrate` answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bytelm.checkpoint.assemble import load
from bytelm.data.corpus import Corpus, Split
from bytelm.data.selection import spread
from bytelm.errors import UsageError
from bytelm.evaluate.calibrate import calibrate
from bytelm.evaluate.patches import lengths_by_kind, mean_size
from bytelm.evaluate.stream import patcher_of
from bytelm.patching.entropy import Entropy
from bytelm.transfer import HOST

SAMPLE = 1 << 20  # training bytes that the thresholds are found on
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


def recalibrate(run: str | Path, size: float, rule: str | None = None, device: torch.device = HOST) -> Calibration:
    """Find the thresholds for a mean patch of `size` bytes. Raises UsageError for a run without a scorer."""
    run = Path(run)
    patcher = patcher_of(load(run, device).model)
    if not isinstance(patcher, Entropy):
        raise UsageError(f"{run} has no scorer whose thresholds could be found: it was not trained on entropy patches")
    corpus = Corpus.open(run / "data")
    config = replace(patcher.config, mean_size=size, rule=rule or patcher.config.rule)
    found = calibrate(config, patcher.scorer, [data for _, data in spread(corpus, "train", SAMPLE)])
    split: Split = next(s for s in ("valid", "test", "train") if corpus.bytes(s))
    kinds = lengths_by_kind(found.build(patcher.scorer), spread(corpus, split, CHECKED))
    return Calibration(
        found.rule,
        found.threshold if found.rule != "rise" else None,
        found.rise if found.rule != "threshold" else None,
        size,
        mean_size(sum(kinds.values(), Counter[int]())),
        {kind: mean_size(lengths) for kind, lengths in sorted(kinds.items()) if lengths},
    )
