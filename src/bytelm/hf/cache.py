"""The cache of `transformers`' `generate`: the ids read so far, and the decoder that has read them.

The ids alone say what a cache holds. What has read them is either a decoder, wherever one may stand for the model's
forward pass, or else the state of that; each can be had again from the ids, so that a cache can be cropped, copied,
pickled, reordered and used with changed weights.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from bytelm.errors import UsageError
from bytelm.hf.reader import Reader, readable
from bytelm.interfaces.model import ByteModel
from bytelm.nn.state import take_rows
from bytelm.transfer import to_device
from bytelm.units import PAD

# Room is made for at least so many ids, and at the most for so many beyond those that are there: memory that is not
# written to costs nothing, and where a row outgrows its room all of it is read again.
LEAST, SPARE = 1 << 10, 1 << 16

_call: ContextVar[object] = ContextVar("_call", default=None)
"""The current call of `generate`, during which weights change only in ways that are tracked."""


@contextmanager
def generating() -> Generator[None]:
    """A call of `generate`."""
    token = _call.set(object())
    try:
        yield
    finally:
        _call.reset(token)


class ByteCache(Cache):
    """The ids of a batch, PADs among them, read by a decoder or by a model's forward pass. It is written to."""

    def __init__(self, expected: int = 0) -> None:
        """`expected`: ids that a row will hold."""
        super().__init__(layers=[])
        self.expected = expected
        self.reset()

    def reset(self) -> None:
        """Nothing read."""
        self.parts: list[Tensor] = []
        self.length = 0
        self.state: Any = None
        self.reader: Reader | None = None
        self.looked: object = None
        self.newest: Tensor | None = None
        """The logits of the last column, `[batch, vocab]`: those of PADs that come next. None: to be made again."""

    def __getstate__(self) -> dict[str, Any]:
        """A decoder is not copied: the copy reads the ids again when it is used."""
        return {**self.__dict__, "reader": None, "looked": None, "newest": None}

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, model: ByteModel, ids: Tensor, keep: int = 0) -> Tensor:
        """The logits of `ids` `[batch, new]`, PADs among them, after what was read before; of the last `keep` alone.

        A PAD has those of the newest id before it in its row. Raises UsageError for another number of rows.
        """
        rows, new = ids.shape
        if self.parts and self.batch_size != rows:
            raise UsageError(f"{rows} rows of ids for a cache of {self.batch_size}: give as many, or a new cache")
        keep = min(keep or new, new)
        reader = None if self.state is not None else self.current(model, ids)
        if reader:
            logits = torch.from_numpy(reader.read(ids.numpy(), keep, self.ids))
        else:
            self.reader = None
            if self.state is None:
                self.state = model.initial_state(rows)
                if self.parts:
                    _, self.state = model(self.ids(), self.state)
            logits, self.state = model(ids, self.state)
            logits = over_pads(logits, ids)[:, -keep:]
        if bool((ids == PAD).any()):
            logits = self.over_leading(model, logits, ids)
        self.newest = logits[:, -1].clone()
        self.parts.append(ids.clone())  # not a view of what the caller has
        self.length += new
        return logits

    def over_leading(self, model: ByteModel, logits: Tensor, ids: Tensor) -> Tensor:
        """`logits` `[batch, keep, vocab]` of the last new ids with those of what was read before for PADs in front."""
        leading = (ids == PAD).int().cummin(1).values.bool()[:, -logits.shape[1] :, None]
        if not self.length or not bool(leading.any()):
            return logits
        if self.newest is None:
            before = self.ids()
            self.newest = over_pads(model(before)[0], before)[:, -1]
        return torch.where(to_device(leading, logits), self.newest[:, None].to(logits), logits)

    def ids(self) -> Tensor:
        """All that was read, `[batch, length]`."""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts, 1)]
        return self.parts[0]

    def current(self, model: ByteModel, ids: Tensor) -> Reader | None:
        """A decoder of the model as it is now, with room for new ids; None where there can be none.

        All weights are compared once in a call of `generate`, and outside of one whenever several ids are read.
        """
        (rows, new), call = ids.shape, _call.get()
        length = self.length + new
        seen, self.looked = call is not None and self.looked is call, call
        fits = self.reader is not None and self.reader.fits(model, rows, length)
        if self.reader and fits and (seen or self.reader.same(closely=call is not None or new > 1)):
            return self.reader
        self.reader = None
        if readable(model):
            room = min(max(2 * max(self.expected, length), LEAST), length + SPARE)
            self.reader = Reader(model, rows, length, room)
            self.reader.agrees = not self.length
        return self.reader

    # --- interface of a cache of `transformers` ---------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Rows; -1 before anything was read."""
        return len(self.parts[0]) if self.parts else -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read, PADs among them: past columns of the attention mask."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, as beam search does."""
        if not self.parts:
            return
        self.parts = [self.ids()[beam_idx.to(self.parts[0].device)]]
        self.newest = None
        if self.state is not None:
            self.state = take_rows(self.state, beam_idx.long())
        if self.reader and not self.reader.select(beam_idx.tolist()):
            self.reader = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same by its other name."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` positions; a decoder goes back, and a state is made again from the ids.

        Raises UsageError for a positive number, as every Cache of `transformers` refuses it.
        """
        if tokens_to_remove > 0:
            raise UsageError(f"crop({tokens_to_remove}): give the number of positions to forget as a negative one")
        if not self.parts or not tokens_to_remove:
            return
        self.parts, self.state, self.newest = [self.ids()[:, :tokens_to_remove]], None, None
        self.length = self.parts[0].shape[1]
        if self.reader:
            self.reader.agrees = False


def over_pads(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits `[batch, new, vocab]` with those of the newest id before it in the place of each PAD's."""
    real = ids != PAD
    if bool(real.all()):
        return logits
    newest = torch.where(real, torch.arange(ids.shape[1]), -1).cummax(1).values
    return logits.take_along_dim(to_device(newest.clamp(min=0), logits)[..., None], 1)
