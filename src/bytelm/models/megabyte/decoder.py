"""Decoder of MEGABYTE: a step of each stage when one of its patches starts."""

from __future__ import annotations

from typing import Any

import numpy as np

from bytelm.errors import UsageError
from bytelm.interfaces.decoder import Backend, Decoder, Ints, NewTokens, Reals, Wanted, fetched, with_ngrams
from bytelm.models.megabyte import device_decoder, host_decoder
from bytelm.models.megabyte.model import Config, Megabyte
from bytelm.nn.norm import EPS
from bytelm.units import BOS


class MegabyteDecoder(Decoder):
    """See `Decoder`. A position of a stage is the offset in the document at which it starts."""

    drafts = True
    prefills = True

    def __init__(self, model: Megabyte, kernels: Backend, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity, kernels)
        config: Config = model.config
        self.kernels = kernels
        self.since = np.zeros(rows, np.int64)
        """Where the ids of each row begin that inner stages have read."""
        parts: Any = device_decoder if kernels.on_device else host_decoder
        self.units = [config.unit(level) for level in range(len(config.dims))]
        self.embed = [parts.Embedding(kernels, embed) for embed in model.embed]
        self.outer = kernels.layers(model.outer.stack, rows, -(-capacity // self.units[0]))
        self.norm = kernels.vector(model.outer.norm.weight)
        line = model.line
        self.across = line is not None
        self.stages = [parts.Stage(kernels, part, rows) for part in (*model.inner, *([] if line is None else [line]))]
        self.ngrams = None if line is None or line.embed.ngram is None else kernels.hashed(line.embed, self.ids)
        self.pads = [kernels.vector(pad.weight) for pad in model.pads]
        self.byte = kernels.table(model.table.weight)
        self.head = kernels.matrix(model.table.weight, whole=True)  # tied to a table, not quantized

    def logits_after(self, new: NewTokens) -> Any:
        """See `Decoder`."""
        return self.wanted_logits(new, None)

    def wanted_logits(self, new: NewTokens, wanted: Wanted | None) -> Any:
        """See `Decoder`. Inner stages read the patches of wanted ids alone, and those that the next ids belong to."""
        if wanted is not None and not self.across and any(stage.inner.reach for stage in self.stages):
            return self.wanted_logits(new, None)[wanted]  # patches read those before them
        inside = None if self.across else wanted  # a byte stage across patches reads all ids
        read = [inside if inside is None else self.read_by(new, inside, unit) for unit in self.units[:-1]]
        for level, unit in enumerate(self.units[:-1]):
            opens = new.position % unit == 0
            if level and (above := read[level - 1]) is not None:
                opens &= above
            if opens.any():
                now = read[level]
                self.open(level, new[opens], None if now is None else now[opens])
        last = read[-1]
        return self.bytes(new, wanted) if wanted is None or last is None else self.bytes(new[last], wanted[last])

    def read_by(self, new: NewTokens, wanted: Wanted, unit: int) -> Wanted:
        """Whether each new id is in a patch of `unit` ids that has a wanted id, or the last one of its row."""
        newest = np.append(new.row[1:] != new.row[:-1], True)
        patch = new.position // unit
        opens = np.append(True, (patch[1:] != patch[:-1]) | newest[:-1])
        self.since[new.row[newest]] = np.maximum(self.since[new.row[newest]], (patch * unit)[newest])
        begins = opens.nonzero()[0]
        return np.logical_or.reduceat(wanted | newest, begins).repeat(np.diff(np.append(begins, len(opens))))

    def rollback(self, rows: Ints, lengths: Ints) -> None:
        """See `Decoder`. Raises UsageError for a length before ids whose logits were not computed."""
        lengths = np.asarray(lengths)
        if ((lengths > 0) & (lengths < self.since[rows])).any():
            least = int(self.since[rows].max())
            raise UsageError(
                f"rolled back to {int(lengths.min())} ids: inner stages have read those from {least} on; "
                "roll back to 0, or read all logits"
            )
        self.since[rows] = np.where(lengths == 0, 0, self.since[rows])
        super().rollback(rows, lengths)

    def reusable(self, row: int, length: int) -> int:
        """See `Decoder`."""
        return super().reusable(row, length) if length >= self.since[row] else 0

    def open(self, level: int, new: NewTokens, read: Wanted | None = None) -> None:
        """A step of a stage at each id that starts one of its positions; `read`: what the stage below reads of them."""
        x = self.embed[level].patches(self.ids, new.row, new.position)
        position = new.position // self.units[level]
        if level:
            x = self.kernels.instead(x, new.position % self.units[level - 1] == 0, self.pads[level - 1])
            x = self.stages[level - 1].read(x, new.row, position, read)
            norm = self.stages[level - 1].norm
        else:
            x = self.outer.run(x, new.row, position, np.zeros_like(position), wanted=read)
            norm = self.norm
        row = new.row
        if read is not None:
            row, position = row[read], position[read]
        self.stages[level].open(row, position, self.kernels.normed(x, norm, EPS))

    def bytes(self, new: NewTokens, wanted: Wanted | None = None) -> Any:
        """The last stage, over ids."""
        last = self.stages[-1]
        ids = new.ids if self.across else np.where(new.position % last.size == 0, BOS, new.ids)
        x, beyond = with_ngrams(self.kernels.embed(self.byte, ids), self.ngrams, new)
        x = last.read(x, new.row, new.position, wanted)
        if beyond is not None:
            x = x + (beyond if wanted is None else beyond[wanted])
        return self.kernels.linear(self.head, x, last.norm, EPS)

    def draft(self, rows: Ints, ids: Ints) -> Reals:
        """See `Decoder`: only the byte stage continues, in a new patch with the input of the last; one id per row."""
        new = self.append(rows, ids)
        last = self.stages[-1]
        opens = new.position % last.size == 0
        if opens.any():
            last.stale(new.row[opens], new.position[opens] // last.size)
        return fetched(self.bytes(new))

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.ids[0].nbytes + self.outer.row_bytes + sum(stage.row_bytes for stage in self.stages)

    def traffic(self, length: int) -> float:
        """See `Decoder`; the mean over the bytes of a patch."""
        found = self.outer.weight_bytes + self.rows * self.outer.slot_bytes * length / self.units[0]
        found = (found + self.embed[0].weight_bytes + self.stages[0].opening_bytes()) / self.units[0]
        for level, stage in enumerate(self.stages, 1):
            own = stage.layers.weight_bytes + self.rows * stage.cached()
            if level < len(self.stages):
                own += self.embed[level].weight_bytes + self.stages[level].opening_bytes()
            found += own / self.units[level]
        return found + self.head.bytes


build = MegabyteDecoder
