"""Compare the logits of a converted run with those of the source's own library."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from bytelm.checkpoint.assemble import Loaded, load
from bytelm.errors import CheckpointError, UsageError
from bytelm.exchange.format import find_layout
from bytelm.units import BOS, BYTES

TEXT = b"The quick brown fox, d\xc3\xa9j\xc3\xa0 vu: 0123456789\n" * 2 + bytes(range(BYTES))
NEAR = 1e-3
"""Relative to the largest logit: far above float32 rounding, far below any difference in the computation."""


@dataclass(frozen=True)
class Agreement:
    """The largest difference of logits, the largest logit, and the number of positions compared."""

    apart: float
    largest: float
    bytes: int


def check(source: Path, layout: str, run: Path) -> Agreement:
    """Compare a source with the run that `convert` made of it, in float32, on some text and every byte value.

    Raises MissingExtraError without the source's library, UsageError if it has no such model, and CheckpointError if
    logits differ by more than rounding.
    """
    loaded = in_little_memory(run)
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


def in_little_memory(run: Path) -> Loaded:
    """A run with its weights as they are stored, which the kernels compute with in float32; else all in float32."""
    try:
        return load(run, tables="mapped")
    except UsageError:  # no kernels, or none for its layers
        return load(run)
