"""(model, ids) → (nats, bytes): a pair of sums, never a mean. Training and measuring both start here."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from bytelm.models.base import ByteModel
from bytelm.patching.layout import Rows
from bytelm.units import BOS, BYTES


def score(
    model: ByteModel,
    ids: Int[Tensor, "batch new"],
    counted: Bool[Tensor, "batch new"] | None = None,
    boundaries: Bool[Tensor, "batch new"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Summed nats of the counted ids given all before them in their row, and how many of those ids are bytes.

    The first id of a row has nothing before it and is never counted. Without `counted`, every byte and every EOS
    counts: what a model has to learn. PADs may stand anywhere, and count nowhere.
    """
    rows = Rows.of(ids)
    ids = rows.ids
    counted = None if counted is None else rows.align(counted)
    boundaries = None if boundaries is None else rows.align(boundaries)
    targets = ids[:, 1:]
    if counted is None:
        counted = ids != BOS
    counted = (counted & rows.real)[:, 1:]
    logits, _ = model(ids[:, :-1], None, None if boundaries is None else boundaries[:, :-1])
    nats = nats_of(logits, targets)
    return (nats * counted).sum(), (counted & (targets < BYTES)).sum()


def nats_of(logits: Float[Tensor, "batch new vocab"], targets: Int[Tensor, "batch new"]) -> Float[Tensor, "batch new"]:
    """-log p of each target, in nats, float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
