"""A memory that learns while the model is read (`bytelm.online`), beside it: its costs, in order of the bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.errors import UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.online.memory import Memory, among_bytes
from bytelm.transfer import to_host


def check(model: ByteModel) -> None:
    """Raises UsageError for a model of tokens, which has no probabilities of single bytes."""
    if model.tokens is not None:
        raise UsageError(
            "this model reads tokens, and an online memory learns bytes: take a model of bytes, or "
            "decoding.bytewise(model)"
        )


def nats_online(
    memory: Memory, logits: Float[Tensor, "new vocab"], targets: Sequence[Int[Tensor, " _"]]
) -> list[float]:
    """The nats of each of several runs of bytes, which follow each other and `memory` learns in this order."""
    nats = memory.nats(torch.cat(list(targets)).numpy().astype(np.uint8), among_bytes(to_host(logits).float().numpy()))
    ends = itertools.accumulate(len(ids) for ids in targets)
    return [float(part.sum()) for part in np.split(nats, [*ends][:-1])]
