"""The inputs of a step that depend on the data alone: windows, their counts, and the model's plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bytelm.data.sampler import Batch
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import Prepared, prepare
from bytelm.training import lengths
from bytelm.units import BOS, BYTES, PAD

Ids = Int[Tensor, "batch ids"]
Opens = Bool[Tensor, "batch ids"]


@dataclass(frozen=True)
class Drawn:
    """The windows of a step, and counts over all of them."""

    batches: list[Prepared]
    """Micro-batches: on the host, and on their way to the model's device."""
    bytes: int
    symbols: int
    """The ids that are scored."""
    patches: int
    """The patches or tokens."""
    lengths: Int[Tensor, " lengths"]
    """See `lengths.of_step`."""


def draw(model: ByteModel, batch: Callable[[int], Batch], step: int, accumulate: int) -> Drawn:
    """The windows of a step of so many micro-batches, from `batch`; counted and planned on the host.

    Not under autocast: its end forgets the weights that it has cast, in all threads, and a step may be using them.
    """
    batches = [to_tensors(batch(step * accumulate + i)) for i in range(accumulate)]
    bytes = sum(int(model.byte_lengths(ids[:, 1:]).sum()) for ids, _ in batches)
    symbols = sum(int(((ids != PAD) & (ids != BOS))[:, 1:].sum()) for ids, _ in batches)
    if model.tokens is not None:
        patches = sum(int((model.byte_lengths(ids[:, 1:]) > 0).sum()) for ids, _ in batches)
    else:
        patches = sum(int((opens & (ids < BYTES)).sum()) for ids, opens in batches if opens is not None)
    prepared = [prepare(model, ids, boundaries=opens) for ids, opens in batches]
    return Drawn(prepared, bytes, symbols, patches, lengths.of_step(model, batches))


def to_tensors(batch: Batch) -> tuple[Ids, Opens | None]:
    """A batch as tensors of the host: ids, and recorded boundaries if there are any."""
    return torch.from_numpy(batch.ids), None if batch.boundaries is None else torch.from_numpy(batch.boundaries)
