"""(model, ids) → (nats, bytes): a pair of sums, never a mean, for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bytelm.interfaces.model import ByteModel
from bytelm.patching.layout import Rows
from bytelm.transfer import to_device
from bytelm.units import BOS

PIECE = 1 << 16  # targets scored at a time


def score(
    model: ByteModel,
    ids: Int[Tensor, "batch new"],
    counted: Bool[Tensor, "batch new"] | None = None,
    boundaries: Bool[Tensor, "batch new"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Summed nats of the counted ids, each given all ids before it in its row, and the number of their bytes.

    The first id of a row is never counted. Without `counted`, every byte and every EOS counts. PADs never count.
    """
    return scored(model, prepare(model, ids, counted, boundaries))


@dataclass(frozen=True)
class Prepared:
    """Ids to be scored, with all that is derived from them on the host."""

    ids: Int[Tensor, "batch new"]
    """The input of the model."""
    boundaries: Bool[Tensor, "batch new"] | None
    plan: Any
    """See `ByteModel.plan`."""
    targets: Int[Tensor, "batch new"]
    """The id after each id, on the model's device."""
    counted: Bool[Tensor, "batch new"]
    """Which targets count, on the model's device."""
    bytes: Int[Tensor, ""]
    """The number of their bytes."""


def prepare(
    model: ByteModel,
    ids: Int[Tensor, "batch new"],
    counted: Bool[Tensor, "batch new"] | None = None,
    boundaries: Bool[Tensor, "batch new"] | None = None,
) -> Prepared:
    """The host part of `score`; transfers to the device are asynchronous."""
    rows = Rows.of(ids)
    ids = rows.ids
    counted = None if counted is None else rows.align(counted)
    boundaries = None if boundaries is None else rows.align(boundaries)
    targets = ids[:, 1:]
    if counted is None:
        counted = ids != BOS
    counted = (counted & rows.real)[:, 1:]
    ids, boundaries = ids[:, :-1], None if boundaries is None else boundaries[:, :-1]
    bytes = (model.byte_lengths(targets) * counted).sum()
    plan = model.plan(ids, None, boundaries)
    return Prepared(ids, boundaries, plan, to_device(targets, model.device), to_device(counted, model.device), bytes)


def scored(model: ByteModel, prepared: Prepared) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The device part of `score`."""
    planned = {} if prepared.plan is None else {"plan": prepared.plan}
    logits, _ = model(prepared.ids, None, prepared.boundaries, **planned)
    return (nats_of(logits, prepared.targets) * prepared.counted).sum(), prepared.bytes


def with_auxiliary(model: ByteModel, nats: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What training minimises of the pass that gave these nats: with the third sum, of models that have one."""
    auxiliary = model.chunking.auxiliary if model.chunking is not None else None
    return nats if auxiliary is None else nats + auxiliary


def nats_of(logits: Float[Tensor, "batch new vocab"], targets: Int[Tensor, "batch new"]) -> Float[Tensor, "batch new"]:
    """-log p of each target, in nats, float32.

    Many targets are scored in pieces, each recomputed in the backward pass, so that only the logits are saved.
    """
    found: list[Tensor] = []
    for part, wanted in zip(logits.flatten(0, 1).split(PIECE), targets.flatten().split(PIECE), strict=True):
        if targets.numel() > PIECE and torch.is_grad_enabled():
            found.append(checkpoint(_nats, part, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_nats(part, wanted))
    return torch.cat(found).view(targets.shape)


def _nats(logits: Float[Tensor, "new vocab"], targets: Int[Tensor, " new"]) -> Float[Tensor, " new"]:
    return F.cross_entropy(logits.float(), targets, reduction="none")
