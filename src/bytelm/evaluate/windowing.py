"""Strided and sliding windows over a trained model (MEGABYTE, section 2.3.3 and Table 9).

Each wraps a model in a model, for evaluation and generation alike; the invariants hold for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm.data.bpe import Tokens
from bytelm.errors import UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.nn.state import put_rows
from bytelm.patching.layout import Rows, at_end, since, tail
from bytelm.transfer import to_device
from bytelm.units import BOS, PAD

Mode = Literal["basic", "sliding", "strided", "both"]


def for_measuring(model: ByteModel, mode: Mode, context: int) -> tuple[ByteModel, int]:
    """The wrapped model, and the stride of windows of `context` ids. Raises UsageError."""
    stride = max(1, context // 2) if mode in ("sliding", "both") else context
    return strided(model) if mode in ("strided", "both") else model, stride


def for_generating(model: ByteModel, mode: Mode, context: int) -> ByteModel:
    """The model as one stream; basic has no windows, and continues beyond `context`. Raises UsageError."""
    model = strided(model) if mode in ("strided", "both") else model
    return sliding(model, context) if mode in ("sliding", "both") else model


def strided(model: ByteModel) -> ByteModel:
    """Two passes offset by half a patch. Raises UsageError for a model without patches of fixed size."""
    if model.patch_size is None:
        raise UsageError(
            f"strided inference reads patches of one size from two offsets, and {type(model).__name__} has none: "
            "use basic or sliding"
        )
    return Strided(model, model.patch_size)


def sliding(model: ByteModel, context: int) -> ByteModel:
    """Overlapping windows of `context` ids. Raises UsageError if patch boundaries would differ between windows."""
    if model.patcher is not None:
        raise UsageError(
            f"sliding windows start within a document, where {type(model).__name__} would place other patch "
            "boundaries: use basic"
        )
    if context < 2:
        raise UsageError(f"context = {context}: sliding inference needs windows of at least 2 ids")
    return Sliding(model, context)


class Windowed(ByteModel):
    """A model around a model, which says where the windows of the other one lie."""

    def __init__(self, model: ByteModel) -> None:
        super().__init__()
        self.model = model

    def init_weights(self, seed: int) -> None:
        """Set every parameter of the model from `seed`."""
        self.model.init_weights(seed)

    @property
    def tokens(self) -> Tokens | None:
        """See `ByteModel`."""
        return self.model.tokens

    @property
    def vocabulary(self) -> int:
        """See `ByteModel`."""
        return self.model.vocabulary

    def byte_lengths(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """See `ByteModel`."""
        return self.model.byte_lengths(ids)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.model.device


@dataclass(frozen=True)
class StridedState:
    """The states of the two passes, the second offset by half a patch."""

    read: Int[Tensor, " batch"]
    offset: Int[Tensor, " batch"]
    first: Any
    second: Any


class Strided(Windowed):
    """Late positions in a patch are predicted worse than early ones, so each byte is taken from where it is early.

        ids        0 1 2 3 | 4 5 6 7 | 8 9 . .       patch 4, offsets in the document
        first      a a . . | a a . . | a a           from the document's start
        second         0 1   2 3 | 4 5   6 7         two ids later: BOS, then as if the document started there
        taken      a a a a   a a b b   a a b b       the first patch is from the first pass

    It costs two passes.
    """

    def __init__(self, model: ByteModel, patch: int) -> None:
        super().__init__(model)
        self.patch = patch

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`: both passes, the second without half a patch."""
        rest = max(0, ids - self.patch // 2)
        return self.model.flops(ids, patches) + (self.model.flops(rest, patches) if rest else 0)

    def initial_state(self, batch: int) -> StridedState:
        """The state of rows that have read nothing yet."""
        zero = torch.zeros(batch, dtype=torch.long)
        return StridedState(zero, zero, self.model.initial_state(batch), self.model.initial_state(batch))

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: StridedState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], StridedState | None]:
        """See `ByteModel`."""
        none = torch.zeros(len(ids), dtype=torch.long)
        begun = state if state is not None else StridedState(none, none, None, None)
        rows, half = Rows.of(ids), self.patch // 2
        offset = since(rows.starts(begun.read), begun.offset)
        later = torch.where(offset == half, BOS, rows.ids).masked_fill((offset < half) | ~rows.real, PAD)
        early, first = self.model(rows.ids, begun.first)
        late, second = self.model(later, begun.second)
        taken = (offset >= self.patch) & (offset % self.patch >= half)
        logits = rows.restore(torch.where(to_device(taken, late)[..., None], late, early))
        if state is None:
            return logits, None
        after = at_end(offset, rows.lengths, state.offset)
        return logits, StridedState(state.read + rows.lengths, after, first, second)


@dataclass(frozen=True)
class SlidingState:
    """The state of each row's present window, and the ids with which the next will start."""

    read: Int[Tensor, " batch"]
    offset: Int[Tensor, " batch"]
    recent: Int[Tensor, "batch kept"]
    inner: Any


class Sliding(Windowed):
    """No id is predicted from more than `context` ids: when a window is full, the next starts with its newer half.

        ids        0 1 2 3 4 5 6 7 8 9          context 4, offsets in the document
        window 0   0 1 2 3
        window 1       . . 4 5                  "." is processed again
        window 2           . . 6 7

    So a model continues indefinitely at the length it was trained for, at twice the cost.
    """

    def __init__(self, model: ByteModel, context: int) -> None:
        super().__init__(model)
        self.context = context
        self.stride = context - context // 2

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`: of one document, all its windows."""
        kept = self.context - self.stride
        found = self.model.flops(min(ids, self.context), patches)
        for first in range(self.context, ids, self.stride):
            found += self.model.flops(kept + min(self.stride, ids - first), patches)
        return found

    def initial_state(self, batch: int) -> SlidingState:
        """The state of rows that have read nothing yet."""
        zero = torch.zeros(batch, dtype=torch.long)
        recent = torch.full((batch, self.context - self.stride), PAD)
        return SlidingState(zero, zero, recent, self.model.initial_state(batch))

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: SlidingState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], SlidingState | None]:
        """See `ByteModel`. Ids of one window are read together; those of other windows are PADs meanwhile."""
        begun = state if state is not None else self.initial_state(len(ids))
        rows = Rows.of(ids)
        offset = since(rows.starts(begun.read), begun.offset)
        full = (offset >= self.context) & ((offset - self.context) % self.stride == 0) & rows.real
        window = full.long().cumsum(1)
        line = torch.cat([begun.recent, rows.ids], 1)
        inner, logits = begun.inner, None
        for index in range(int(window.max()) + 1 if window.numel() else 1):
            if index:
                inner = self.restarted(inner, full & (window == index), line)
            here = window == index
            found, inner = self.model(rows.ids.masked_fill(~here, PAD), inner)
            logits = found if logits is None else torch.where(to_device(here, found)[..., None], found, logits)
        assert logits is not None and logits.shape[-1] == self.vocabulary
        if state is None:
            return rows.restore(logits), None
        kept = self.context - self.stride
        after = at_end(offset, rows.lengths, state.offset)
        recent = tail(line, kept + rows.lengths, kept)
        return rows.restore(logits), SlidingState(state.read + rows.lengths, after, recent, inner)

    def restarted(self, inner: Any, opens: Bool[Tensor, "batch new"], line: Int[Tensor, "batch slots"]) -> Any:
        """The state in which rows that start a window at `opens` have read its overlap only."""
        rows, slots = opens.nonzero(as_tuple=True)
        kept = self.context - self.stride
        _, fresh = self.model(tail(line[rows], slots + kept, kept), self.model.initial_state(len(rows)))
        return put_rows(inner, rows, fresh)
