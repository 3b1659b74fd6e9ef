"""Batches of training windows: each a pure function of (seed, step, rank, world), so that nothing has to be saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.data.boundaries import Boundaries
from bytelm.data.corpus import Split
from bytelm.data.tokens import Source
from bytelm.errors import DataError
from bytelm.units import BOS, EOS, PAD

_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """Windows of a stream: `ids[:, :-1]` is read, `ids[:, 1:]` is predicted.

    `boundaries[:, t]` says that what follows `ids[:, t]` opens a patch, as it was recorded; true at BOS and EOS,
    false at PAD. None where nothing was recorded.
    """

    ids: NDArray[np.int64]  # [batch, window + 1]
    boundaries: NDArray[np.bool_] | None  # [batch, window + 1]


@runtime_checkable
class Windows(Protocol):
    """Batches by step: a `Sampler`, or a `mixture.Mixture` of several."""

    @property
    def elsewhere(self) -> bool:
        """Whether a batch is read from a store, which answers late."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of this rank at a step, from 0 on. Threads may call it at the same time."""
        ...

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0 on, in which a step begins; of several sources, of that read most often."""
        ...


class Sampler:
    """Cuts the stream of a split into windows and gives them in an order that is new in each epoch.

    The stream is every document as BOS, its bytes (or tokens), EOS, in order, as a circular stream. An epoch splits it
    into windows from a phase of its own; each shares one id with the next, so that each id is predicted exactly once:

        ring     B a b c E B d e E        phase 2, window 4
        windows      b c E B d            predicts c E B d
                             d e E B a    predicts e E B a
                                     a b  predicts b, filled up with PAD

    With `aligned`, each document is cut on its own, from its BOS on, so that its windows are the same in every epoch:

        documents    B a b c d e E  B f E        window 4
        windows      B a b c d                   predicts a b c d
                             d e E               predicts e E, filled up with PAD
                                    B f E        predicts f E, filled up with PAD

    Sample g of a training is window g % windows of epoch g // windows, in the epoch's order; step s of a rank takes the
    samples from (s * world + rank) * batch on. So the samples of a step do not depend on how many ranks share it.
    """

    elsewhere = False
    """See `Windows`."""

    def __init__(
        self,
        source: Source,
        split: Split,
        window: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        boundaries: Boundaries | None = None,
        aligned: bool = False,
    ) -> None:
        """Windows of `window` predictions, `batch` of them a step on each of `world` ranks.

        Raises DataError for a split without documents, or boundaries of another corpus.
        """
        if window < 1 or batch < 1 or not 0 <= rank < world:
            raise ValueError(f"no windows with window={window}, batch={batch}, rank={rank}, world={world}")
        table = source.documents(split)
        if len(table) == 0:
            raise DataError(f"the {split} split of {source.directory} is empty: pack more data, or a larger fraction")
        if boundaries is not None and boundaries.total != source.total:
            raise DataError(
                f"{boundaries.total} bytes of boundaries do not fit {source.total} of data: record them again"
            )
        self._source, self._boundaries, self.elsewhere = source, boundaries, source.elsewhere
        self._starts, self._sizes = table.starts, table.sizes
        self._offsets = np.cumsum(table.sizes + 2) - (table.sizes + 2)  # [documents] where each BOS is in the stream
        self.window, self._batch, self._seed = window, batch, seed
        self._rank, self._world = rank, world
        self.ids = int(table.sizes.sum()) + 2 * len(table)  # ids of one epoch
        counts = -(-(table.sizes + 1) // window)
        self._firsts = np.cumsum(counts) - counts if aligned else None  # [documents] the number of the first window
        self.windows = int(counts.sum()) if aligned else -(-self.ids // window)  # windows of one epoch

    @property
    def recorded(self) -> bool:
        """Whether the windows have boundaries."""
        return self._boundaries is not None

    def batch(self, step: int) -> Batch:
        """The batch of this rank at a step, from 0 on."""
        shape = (self._batch, self.window + 1)
        ids = np.full(shape, PAD, np.int64)
        boundaries = np.zeros(shape, bool) if self.recorded else None
        first = (step * self._world + self._rank) * self._batch
        for row in range(self._batch):
            self.write(first + row, ids[row], None if boundaries is None else boundaries[row])
        return Batch(ids, boundaries)

    def write(self, sample: int, ids: NDArray[np.int64], boundaries: NDArray[np.bool_] | None) -> None:
        """Write a sample over `ids` `[window + 1]` (all PAD before) and, where there are, `boundaries` (all false)."""
        column = 0
        for start, stop in self._spans(sample):
            columns = slice(column, column + stop - start)
            self._fill(start, stop, ids[columns], None if boundaries is None else boundaries[columns])
            column = columns.stop

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0 on, in which a step begins."""
        return step * self._world * self._batch // self.windows

    def _spans(self, sample: int) -> list[tuple[int, int]]:
        """The span of a window in the stream: one, or two if it wraps around."""
        epoch, turn = divmod(sample, self.windows)
        keys = _keys(self._seed, epoch)
        number = permuted(turn, self.windows, keys[1:])
        if self._firsts is not None:
            return [self._aligned_span(number, self._firsts)]
        begin = number * self.window
        length = min(self.window, self.ids - begin) + 1
        start = (begin + keys[0] % self.window) % self.ids
        stop = min(start + length, self.ids)
        rest = length - (stop - start)
        return [(start, stop), (0, rest)] if rest else [(start, stop)]

    def _aligned_span(self, number: int, firsts: NDArray[np.int64]) -> tuple[int, int]:
        """The span of a window in the stream if windows start at documents."""
        document = int(np.searchsorted(firsts, number, side="right")) - 1
        start = int(self._offsets[document]) + (number - int(firsts[document])) * self.window
        end = int(self._offsets[document] + self._sizes[document]) + 2
        return start, min(start + self.window + 1, end)

    def _fill(self, start: int, stop: int, ids: NDArray[np.int64], boundaries: NDArray[np.bool_] | None) -> None:
        """Write the ids `start` to `stop` of the stream, and what is recorded of them, where they belong."""
        documents = slice(
            int(np.searchsorted(self._offsets, start, side="right")) - 1, int(np.searchsorted(self._offsets, stop))
        )
        offsets, sizes = self._offsets[documents], self._sizes[documents]
        opening = offsets - start  # of each BOS among the requested ids
        closing = opening + sizes + 1
        opening, closing = opening[opening >= 0], closing[closing < stop - start]
        is_byte = np.ones(stop - start, bool)
        is_byte[opening] = is_byte[closing] = False
        skipped = np.clip(start - offsets - 1, 0, sizes)  # bytes of the first document that come before the span
        counts = np.clip(stop - offsets - 1, 0, sizes) - skipped
        runs = _runs(self._starts[documents] + skipped, counts)
        ids[is_byte] = _gather(self._source.read, runs)
        ids[opening] = BOS
        ids[closing] = EOS
        if boundaries is not None and self._boundaries is not None:
            boundaries[:] = True
            boundaries[is_byte] = _gather(self._boundaries.read, runs)


def _runs(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The same (start, count) spans with those joined that follow each other without a gap."""
    gaps = np.flatnonzero(starts[1:] != starts[:-1] + counts[:-1]) + 1
    firsts = np.concatenate([[0], gaps])
    return list(zip(starts[firsts].tolist(), np.add.reduceat(counts, firsts).tolist(), strict=True))


def _gather(read: Callable[[int, int], NDArray[Any]], runs: list[tuple[int, int]]) -> NDArray[Any]:
    return np.concatenate([read(start, count) for start, count in runs])


def _keys(seed: int, epoch: int) -> list[int]:
    """Pseudo-random 64-bit numbers from (seed, epoch): the phase, and one for each round."""
    digest = blake2b(f"{seed} {epoch}".encode(), digest_size=8 * (_ROUNDS + 1)).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]


def permuted(index: int, count: int, keys: list[int]) -> int:
    """Where a pseudo-random permutation of `range(count)` takes `index`, without the permutation being stored.

    A Feistel network permutes the numbers of an even count of bits, the first that holds the range. Where it leaves
    the range it is applied again: it goes around a cycle that began inside, so that it must come back.
    """
    half = (max(count - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = left << half | right
        if index < count:
            return index


def _mixed(number: int) -> int:
    """A number of 64 bits in which every bit of the result depends on every bit given (the finisher of splitmix64)."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ (number >> 31)


def held_out(
    source: Source, window: int, boundaries: Boundaries | None = None, aligned: bool = False
) -> Sampler | None:
    """Windows of the validation documents, the same at every validation pass; None where there are none."""
    if not len(source.documents("valid")):
        return None
    return Sampler(source, "valid", window, batch=8, seed=0, boundaries=boundaries, aligned=aligned)
