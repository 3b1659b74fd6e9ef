"""A run that was converted beside its source in the source's own library: are the logits the same?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from bytelm.checkpoint.assemble import load
from bytelm.errors import CheckpointError
from bytelm.exchange.format import find_layout
from bytelm.units import BOS, BYTES

TEXT = b"The quick brown fox, d\xc3\xa9j\xc3\xa0 vu: 0123456789\n" * 2 + bytes(range(BYTES))
NEAR = 1e-3
"""Of the largest logit. Float32 in another order of sums stays far below; anything done otherwise comes far above."""


@dataclass(frozen=True)
class Agreement:
    """How far logits are apart at the most, how large the largest is, and after how many bytes they were compared."""

    apart: float
    largest: float
    bytes: int


def check(source: Path, layout: str, run: Path) -> Agreement:
    """Compare the logits of a source and of the run that `convert` made of it, in float32, on some text and every byte.

    Raises MissingExtraError without the source's library, UsageError where that has no such model, and CheckpointError
    where logits differ by more than rounding does.
    """
    loaded = load(run)
    text = TEXT[: int(loaded.state["context"])]
    ids = torch.tensor([[BOS, *text]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = find_layout(layout).compared(source, loaded.model, ids, loaded.model(ids)[0][0])
    found = Agreement(float((ours - theirs).abs().max()), float(theirs.abs().max()), len(text))
    if not found.apart <= NEAR * found.largest:
        raise CheckpointError(
            f"{run}: logits are up to {found.apart:.3g} from those of {source} (the largest is {found.largest:.3g}): "
            "the source computes something that bytelm does not; do not use this run"
        )
    return found
