"""A decoder under `transformers`' generation: rows are rolled back to the common prefix, and read on.

The rows of a batch are columns of ids with PADs among them, and a row may hold several documents. A decoder holds one
document a row, without PADs; a BOS in the middle therefore starts its row anew.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm.decoding import open_decoder, why_plain
from bytelm.errors import ResourceError
from bytelm.interfaces.decoder import CHUNK, Decoder, Ints, Reals
from bytelm.interfaces.model import ByteModel
from bytelm.native.weights import checksum
from bytelm.threads import all_or_one
from bytelm.units import BOS, PAD, VOCAB


@dataclass
class Unread:
    """What one row of a batch has yet to read."""

    slot: int
    """Its row in the decoder."""
    ids: Ints
    newest: Ints
    """For each column whose logits are wanted, the newest of `ids` at or before it; -1 where there is none."""
    read: int = 0

    @classmethod
    def of(cls, slot: int, lost: Ints, new: Ints, keep: int) -> Unread:
        """What a row holds no longer and what is new, PADs among it; of that, logits of the last columns are wanted."""
        real = new != PAD
        count = real.cumsum()
        newest = np.where(count > 0, len(lost) + count - 1, -1)
        return cls(slot, np.concatenate([lost, new[real]]), newest[len(new) - keep :])

    def part(self, most: int) -> Ints:
        """The next ids to read together, up to a BOS that starts another document."""
        part = self.ids[self.read : self.read + most]
        starts = (part[1:] == BOS).nonzero()[0]
        return part[: starts[0] + 1] if len(starts) else part


class Reader:
    """A model's decoder, and the rows of it that hold the rows of a batch."""

    def __init__(self, model: ByteModel, rows: int, needed: int, room: int) -> None:
        """Room for `needed` ids a row, as many as `room` if there is memory. Raises ResourceError without any."""
        self.model, self.decoder = model, opened(model, rows, needed, room)
        self.slots: Ints = np.arange(rows)
        self.reach: Ints = np.zeros(rows, np.int64)
        """Ids that each row of the decoder ever held since it was empty: it goes back by CHUNK from there."""
        self.agrees = True
        """Whether the rows have read what the batch holds."""
        thread_pool = self.decoder.thread_pool
        self.threads = all_or_one(thread_pool.most) if thread_pool and thread_pool.most > 1 else None
        self.parameters = list(model.parameters())
        self.counted = self.count()
        self.content = content(model)

    # --- whether it is still the model that it was opened for ---------------------------------------------------------

    def count(self) -> tuple[int, int]:
        """What nearly every change of the parameters changes, in a few microseconds."""
        return sum(map(VERSION, self.parameters)), sum(map(Tensor.data_ptr, self.parameters))

    def fits(self, model: ByteModel, rows: int, length: int) -> bool:
        """Whether it is this model's, has these rows, and room for so many ids."""
        if model is not self.model or model.training or differentiated(self.parameters):
            return False
        return rows == len(self.slots) and length <= self.decoder.capacity

    def same(self, closely: bool) -> bool:
        """Whether the model is what it was when it was opened; `closely` compares all weights."""
        if self.count() != self.counted:
            return False
        return not closely or (decodable(self.model) and content(self.model) == self.content)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> bool:
        """Reorder the rows of the batch. False if the decoder has too few."""
        taken: dict[int, int] = {}
        for place, row in enumerate(rows):
            taken.setdefault(int(self.slots[row]), place)
        free = [slot for slot in range(self.decoder.rows) if slot not in taken]
        if len(rows) > self.decoder.rows:
            return False
        slots = {place: slot for slot, place in taken.items()}
        self.slots = np.array([slots[place] if place in slots else free.pop() for place in range(len(rows))])
        self.agrees = False
        return True

    def back(self, slot: int, document: Ints) -> Ints:
        """Take a row back to where it agrees with a document, and give what of that it has not read."""
        length = int(self.decoder.lengths[slot])
        self.reach[slot] = max(self.reach[slot], length)
        shorter = min(length, len(document))
        differ = (self.decoder.ids[slot, :shorter] != document[:shorter]).nonzero()[0]
        common = int(differ[0]) if len(differ) else shorter
        if common < length:
            common = common if self.reach[slot] - common <= CHUNK else 0
            self.rollback(slot, common)
        return document[common:]

    def rollback(self, slot: int, length: int) -> None:
        """Take a row back to a length."""
        self.decoder.rollback(np.array([slot]), np.array([length]))
        if not length:
            self.reach[slot] = 0

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, ids: Ints, keep: int, before: Callable[[], Tensor]) -> Reals:
        """Logits `[rows, keep, vocab]` of the last columns of new ids `[rows, new]`; `before`: what the rows hold.

        A PAD has the logits of the newest id before it among the new ones, or zeros.
        """
        agreed, self.agrees = self.agrees, False  # should reading fail halfway
        if agreed and ids.shape[1] == 1 and not ODD.intersection(ids[:, 0].tolist()):
            began = time.perf_counter()
            found = self.decoder.read(self.slots, ids[:, 0])[:, None]
            if self.threads and self.decoder.thread_pool:
                self.threads.note(time.perf_counter() - began, len(ids))
                self.decoder.thread_pool.threads = self.threads.option
        else:
            found = self.all(ids, keep, None if agreed else before().numpy())
        self.agrees = True
        return found

    def all(self, ids: Ints, keep: int, before: Ints | None) -> Reals:
        """The same for rows of any kind, which read together, each as much as it may at once.

        `before` is given where rows may have to read again what the batch holds.
        """
        lost = [NOTHING] * len(ids)
        if before is not None:
            lost = [self.back(slot, document(line)) for slot, line in zip(self.slots.tolist(), before, strict=True)]
        unread = [Unread.of(*row, keep) for row in zip(self.slots.tolist(), lost, ids, strict=True)]
        found = np.zeros((len(ids), keep, VOCAB), np.float64 if self.exact else np.float32)
        while any(row.read < len(row.ids) for row in unread):
            parts = [row.part(self.decoder.chunk) for row in unread]
            for row, part in zip(unread, parts, strict=True):
                if len(part) and part[0] == BOS and self.decoder.lengths[row.slot]:
                    self.rollback(row.slot, 0)
            logits = self.decoder.read(self.slots.repeat([len(part) for part in parts]), np.concatenate(parts))
            begin = 0
            for row, part, out in zip(unread, parts, found, strict=True):
                place = row.newest - row.read
                here = (place >= 0) & (place < len(part))
                out[here] = logits[begin + place[here]]
                row.read += len(part)
                begin += len(part)
        return found

    @property
    def exact(self) -> bool:
        """Whether all numbers are float64."""
        return self.parameters[0].dtype == torch.float64


NOTHING: Ints = np.zeros(0, np.int64)
ODD = {PAD, BOS}
VERSION = operator.attrgetter("_version")


def differentiated(parameters: Iterable[Tensor]) -> bool:
    """Whether what is computed has gradients."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)


def readable(model: ByteModel) -> bool:
    """Whether a decoder can replace the model's forward pass: no gradients, no dropout, and supported by kernels."""
    if differentiated(model.parameters()):
        return False
    return not any(module.training for module in model.modules()) and decodable(model)


def decodable(model: ByteModel) -> bool:
    """Whether kernels read a model: transformers' loop on a GPU has logits there, and a decoder would fetch them."""
    return model.device.type == "cpu" and not why_plain(model)


def content(model: ByteModel) -> list[Any]:
    """What a decoder is made from: how the model is built, and its numbers."""
    tensors = [*model.parameters(), *model.buffers()]
    return [model.config, model.patcher and model.patcher.config, *map(checksum, tensors)]


def document(ids: NDArray[np.int64]) -> Ints:
    """The newest document of a row, without PADs."""
    real = ids[ids != PAD]
    starts = (real == BOS).nonzero()[0]
    return real[starts[-1] :] if len(starts) else real


def opened(model: ByteModel, rows: int, needed: int, room: int) -> Decoder:
    """A decoder with room for more ids than are needed, as far as the memory allows. Raises ResourceError."""
    capacity = max(needed, room)
    while True:
        try:
            return open_decoder(model, rows=rows, capacity=capacity)
        except (MemoryError, torch.OutOfMemoryError):
            if capacity == needed:
                raise ResourceError(
                    f"no memory for {rows} sequences of {needed} ids: give fewer or shorter ones"
                ) from None
            capacity = max(needed, capacity // 2)
