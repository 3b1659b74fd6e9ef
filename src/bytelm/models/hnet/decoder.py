"""Decoder of H-Net: each network runs at the positions that it has, the inner ones where a chunk opens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.interfaces.decoder import Backend, Decoder, Ints, NewTokens, Reals, with_ngrams
from bytelm.models.hnet.model import Config, HNet
from bytelm.models.hnet.stage import ChunkingStage, Innermost, Widen
from bytelm.native.kernels import Kernels
from bytelm.nn.norm import EPS

TINY = 1e-8  # of `torch.nn.functional.cosine_similarity`: lengths of vectors are at least this


def outer(kernels: Backend, widen: Widen) -> Any:
    """What `Widen` puts behind vectors; None if nothing."""
    return None if widen.pad is None else kernels.vector(widen.pad.weight)


def widened(x: Reals, pad: Reals | None) -> Reals:
    """See `Widen`."""
    return x if pad is None else np.concatenate([x, np.broadcast_to(pad, (len(x), pad.shape[1]))], 1)


def begins(row: Ints) -> Ints:
    """Of positions sorted by row, the index of the first of the same row."""
    new = np.diff(row, prepend=-1) != 0
    return np.flatnonzero(new)[np.cumsum(new) - 1]


def cosine(kernels: Kernels, a: Reals, b: Reals) -> Reals:
    """The cosine of the angle between two vectors of each row, by sums in the kernels' order: boundaries follow it."""
    # In one call: for a step of one byte calls take longer than what they compute.
    found = kernels.dots(np.concatenate([a, b, a]), np.concatenate([a, b, b])).reshape(3, -1)
    lengths = np.maximum(np.sqrt(found[:2]), TINY)
    return found[2] / (lengths[0] * lengths[1])


class InnermostRows:
    """The innermost network over rows."""

    def __init__(self, network: Innermost, kernels: Backend, rows: int, capacity: int) -> None:
        self.kernels = kernels
        self.pad = outer(kernels, network.widen)
        self.layers = kernels.layers(network.stack, rows, capacity)
        self.norm = kernels.vector(network.norm.weight)
        self.row_bytes = self.layers.row_bytes

    def read(self, x: Reals, row: Ints, position: Ints) -> Reals:
        """Outputs at new positions, sorted by row."""
        y = self.layers.run(widened(x, self.pad), row, position, np.zeros_like(row))
        return np.ascontiguousarray(self.kernels.normed(y, self.norm, EPS)[:, : x.shape[1]])

    def traffic(self, length: float, read: Ints) -> float:
        """Bytes of weights and caches that a position in every row reads, after `length` of them; see `StageRows`."""
        return self.layers.weight_bytes + len(read) * length * self.layers.slot_bytes


class StageRows:
    """A stage over rows. What later positions need is kept by position, in rings that a rollback cannot leave."""

    def __init__(self, stage: ChunkingStage, config: Config, kernels: Backend, rows: int, capacity: int) -> None:
        self.kernels, self.window = kernels, config.attention_window
        seen, dim = min(capacity, self.window + kernels.chunk), len(stage.norm.weight)
        self.pad = outer(kernels, stage.widen)
        self.encoder, self.decoder = (kernels.layers(part, rows, seen) for part in (stage.encoder, stage.decoder))
        self.encoder_norm, self.norm = kernels.vector(stage.encoder_norm.weight), kernels.vector(stage.norm.weight)
        linears = (stage.router.query, stage.router.key, stage.residual)
        self.query, self.key, self.residual = (kernels.matrix(part.weight) for part in linears)
        self.inner: Any = (
            InnermostRows(stage.inner, kernels, rows, capacity)
            if isinstance(stage.inner, Innermost)
            else StageRows(stage.inner, config, kernels, rows, capacity)
        )
        self.slots = 2 * kernels.chunk + 2
        self.count: Ints = np.zeros((rows, capacity), np.int64)
        """Chunks that have opened in a row once a position is read."""
        real = kernels.host.real
        self.keys, self.latents = (np.zeros((rows, self.slots, dim), real) for _ in range(2))
        """The router's keys by position; the smoothed outputs by chunk."""
        own = [self.count, self.keys, self.latents]
        layers = self.encoder.row_bytes + self.decoder.row_bytes
        self.row_bytes = sum(array[0].nbytes for array in own) + layers + self.inner.row_bytes

    def read(self, x: Reals, row: Ints, position: Ints, beyond: Reals | None = None) -> Reals:
        """Outputs at new positions, sorted by row; `beyond` is added before the norm."""
        width, start = x.shape[1], np.zeros_like(row)
        x = self.encoder.run(widened(x, self.pad), row, position, start)
        x = self.kernels.normed(x, self.encoder_norm, EPS)
        probability = self.probability(x, row, position)
        opens = probability >= 0.5
        count = self.counted(opens, row, position)
        if opens.any():
            self.advance(x[opens], probability[opens], row[opens], count[opens] - 1)
        y = self.latents[row, (count - 1) % self.slots] + self.kernels.linear(self.residual, x)
        y = self.decoder.run(y, row, position, start)
        y = y if beyond is None else y + beyond
        return np.ascontiguousarray(self.kernels.normed(y, self.norm, EPS)[:, :width])

    def probability(self, x: Reals, row: Ints, position: Ints) -> Reals:
        """See `Router`."""
        key = self.kernels.linear(self.key, x)
        self.keys[row, position % self.slots] = key
        before = self.keys[row, (position - 1) % self.slots]
        cosines = cosine(self.kernels.host, self.kernels.linear(self.query, x), before)
        return np.where(position == 0, 1.0, np.clip(1 - cosines, 0, 2) / 2).astype(x.dtype)

    def counted(self, opens: NDArray[np.bool_], row: Ints, position: Ints) -> Ints:
        """Chunks that have opened in a row once each new position is read."""
        first, total = begins(row), np.cumsum(opens)
        before = np.where(position > 0, self.count[row, np.maximum(position - 1, 0)], 0)
        self.count[row, position] = total + (before - total + opens)[first]
        return self.count[row, position]

    def depth(self, row: int, length: int) -> Ints:
        """In how many stages each of the first positions of a row has opened a chunk."""
        opened = np.diff(self.count[row, :length], prepend=0)
        if isinstance(self.inner, StageRows):
            opened[opened > 0] += self.inner.depth(row, int(opened.sum()))
        return opened

    def advance(self, x: Reals, chance: Reals, row: Ints, chunk: Ints) -> None:
        """Read new chunks, sorted by row, and smooth what comes out."""
        y = self.inner.read(np.ascontiguousarray(x), row, chunk)
        place = np.arange(len(row)) - begins(row)
        for turn in range(int(place.max()) + 1):  # the first new chunk of each row, then the second, and so on
            at = place == turn
            share, own = chance[at, None], row[at]
            before = self.latents[own, (chunk[at] - 1) % self.slots]
            self.latents[own, chunk[at] % self.slots] = share * y[at] + (1 - share) * before

    def traffic(self, length: float, read: Ints) -> float:
        """Bytes of weights and caches that a position in every row reads, after `length` of them.

        `read`: positions that each row has read, so that chunks are as frequent as they were.
        """
        opened = np.where(read > 0, self.count[np.arange(len(read)), np.maximum(read - 1, 0)], 0)
        chunks = opened.sum() / max(1, read.sum())
        cached = min(length, self.window) * (self.encoder.slot_bytes + self.decoder.slot_bytes)
        own = self.encoder.weight_bytes + self.decoder.weight_bytes
        own += self.query.bytes + self.key.bytes + self.residual.bytes
        return own + len(read) * cached + chunks * self.inner.traffic(length * chunks, opened)


class HNetDecoder(Decoder):
    """See `Decoder`."""

    @staticmethod
    def unsupported(model: HNet) -> str:
        """See `Decoder`."""
        if model.config.published:
            return "the kernels do not know the layers of model.published"
        return "" if model.device.type == "cpu" else "boundaries that a model learns are decided on the host"

    def __init__(self, model: HNet, kernels: Backend, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity, kernels)
        self.kernels = kernels
        self.byte, self.head = kernels.table(model.embed.byte.weight), kernels.matrix(model.head.weight)
        self.ngrams = kernels.hashed(model.embed, self.ids) if model.embed.ngram else None
        self.stage = StageRows(model.stage, model.config, kernels, rows, capacity)

    def logits_after(self, new: NewTokens) -> Any:
        """See `Decoder`."""
        x, beyond = with_ngrams(self.kernels.embed(self.byte, new.ids), self.ngrams, new)
        return self.kernels.linear(self.head, self.stage.read(x, new.row, new.position, beyond))

    def depth(self, row: int) -> Ints:
        """See `Decoder`."""
        return self.stage.depth(row, int(self.lengths[row]))

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.stage.row_bytes + self.ids[0].nbytes

    def traffic(self, length: int) -> float:
        """See `Decoder`; with the chunks of the rows so far."""
        return self.head.bytes + self.stage.traffic(length, self.lengths)


build = HNetDecoder
