"""Histograms of patch or token lengths of a step, which add up over steps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from bytelm.interfaces.model import ByteModel
from bytelm.units import BYTES

LONGEST = 32  # bytes: what is longer is counted here too


def of_step(
    model: ByteModel, batches: list[tuple[Int[Tensor, "batch ids"], Bool[Tensor, "batch ids"] | None]]
) -> Int[Tensor, " lengths"]:
    """How many patches (tokens, of a model of these) have 1, 2, … LONGEST bytes in windows of a step, on the host.

    None at all for models that read bytes one by one or count their patches, as MEGABYTE does.
    """
    counts = torch.zeros(LONGEST, dtype=torch.long)
    for ids, opens in batches:
        if model.tokens is not None:
            counts += counted(model.byte_lengths(ids[:, 1:]).flatten())
        elif opens is not None:
            counts += counted(between(ids, opens))
    return counts


def learned(ids: Int[Tensor, "batch ids"], opens: Bool[Tensor, "batch ids"]) -> tuple[int, Int[Tensor, " lengths"]]:
    """Patches that a model cuts itself, where `opens` says that an id opens one: how many, and of which lengths."""
    return int((opens & (ids < BYTES)).sum()), counted(between(ids, F.pad(opens[:, 1:], (0, 1))))


def between(ids: Int[Tensor, "batch ids"], opens: Bool[Tensor, "batch ids"]) -> Int[Tensor, " patches"]:
    """The bytes of each patch that lies in its window as a whole; 0 for those of BOS and EOS alone.

    A patch ends where `opens` says that the next id opens one. What the edges of a window cut is left out.
    """
    read = (ids < BYTES).long().cumsum(1)
    row = opens.nonzero()[:, 0]
    return read[opens].diff()[row[1:] == row[:-1]]


def counted(sizes: Int[Tensor, " patches"]) -> Int[Tensor, " lengths"]:
    """How many of the sizes are 1, 2, … LONGEST; those of 0 are no patches."""
    return torch.bincount(sizes.clamp(max=LONGEST), minlength=LONGEST + 1)[1:]
