"""The one interface of generation: rows that stand still in memory, read byte by byte or in chunks, and step back."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bytelm.data.bpe import Bpe
from bytelm.errors import UsageError
from bytelm.native.kernels import History, Kernels, ThreadPool
from bytelm.transfer import to_host
from bytelm.units import VOCAB

CHUNK = 64  # ids of one row that are read at once at the most: what rings hold beyond their window

Ints = NDArray[np.int64]
Reals = NDArray[Any]
"""float32, or float64 for a model in float64"""


@dataclass(frozen=True)
class NewTokens:
    """Ids to be read: those of one row stand together, in order. Each array is `[n]`."""

    row: Ints
    position: Ints
    ids: Ints

    def __getitem__(self, which: Any) -> NewTokens:
        """Some of them."""
        return NewTokens(self.row[which], self.position[which], self.ids[which])


@runtime_checkable
class Backend(Protocol):
    """What computes for a decoder, and where activations stay between its parts: arrays here, tensors on a device.

    Whole numbers come in as arrays of the host. What `table`, `matrix` and `vector` give is for the others to read.
    """

    @property
    def chunk(self) -> int:
        """Ids of one row that may be read at once; caches of a window hold so many positions beyond it."""
        ...

    @property
    def repeats(self) -> bool:
        """See `Decoder.repeats`."""
        ...

    @property
    def thread_pool(self) -> ThreadPool | None:
        """See `Decoder.team`."""
        ...

    @property
    def on_device(self) -> bool:
        """Whether activations are tensors on a device, and not arrays."""
        ...

    @property
    def host(self) -> Kernels:
        """The kernels that decide where patches open, and look up n-grams."""
        ...

    def precise(self) -> Backend:
        """The same without rounded weights."""
        ...

    def vector(self, weight: Tensor) -> Any:
        """A norm's weight, or a few rows of a table, as numbers to compute with."""
        ...

    def table(self, weight: Tensor) -> Any:
        """A weight that rows are taken from, as it is."""
        ...

    def matrix(self, weight: Tensor, *, whole: bool = False) -> Any:
        """The weight `[out, in]` of a linear layer, rounded unless it is to stay `whole`; has `bytes`."""
        ...

    def embed(self, table: Any, ids: Ints) -> Any:
        """Rows of a table `[n, dim]`."""
        ...

    def linear(self, matrix: Any, x: Any, norm: Any = None, eps: float = 0.0) -> Any:
        """`[n, out]` from `[n, in]`, RMS-normed before if there is a weight for it, as before logits."""
        ...

    def normed(self, x: Any, weight: Any, eps: float) -> Any:
        """Lines `[n, dim]` after RMSNorm."""
        ...

    def instead(self, x: Any, where: NDArray[np.bool_], line: Any) -> Any:
        """Lines `[n, dim]`, some of them replaced by one."""
        ...

    def entropies(self, logits: Any) -> Reals:
        """The entropy in nats of each row of logits, on the host."""
        ...

    def layers(self, *args: Any, **options: Any) -> Any:
        """A stack over rows, see `stacks.Layers`."""
        ...


def fetched(x: NDArray[Any] | Tensor) -> Reals:
    """Activations on the host: from a device the one wait of a step."""
    return x if isinstance(x, np.ndarray) else to_host(x).numpy()


class Decoder(abc.ABC):
    """A model that generates in a fixed number of rows, each one document: BOS at position 0, then its bytes.

    All that is remembered lies at its position, so that a row goes back by being told its length, and starts again
    by going back to nothing.
    """

    drafts = False
    """Whether `draft` is there: a cheaper guess at what `read` would give."""
    repeats = True
    """Whether what a row gives is the same to the last bit whatever is read beside it, and in pieces of any size."""
    thread_pool: ThreadPool | None = None
    """The threads that the kernels run in, where there are kernels."""
    chunk = CHUNK
    """Ids of one row that may be read at once."""
    tokens: Bpe | None = None
    """What ids are of a model of tokens."""

    def __init__(self, rows: int, capacity: int, backend: Backend | None = None) -> None:
        self.rows, self.capacity = rows, capacity
        if backend:
            self.thread_pool, self.chunk, self.repeats = backend.thread_pool, backend.chunk, backend.repeats
        self.lengths: Ints = np.zeros(rows, np.int64)
        """Ids that each row has read."""
        self.ids: Ints = np.zeros((rows, capacity), np.int64)

    def read(self, rows: Ints, ids: Ints) -> Reals:
        """Logits `[n, vocab]` after each new id `[n]`, ids of one row together and in order, `chunk` a row at the most.

        Raises UsageError for more ids than a row has room for.
        """
        return fetched(self.after(self.placed(rows, ids)))

    def draft(self, rows: Ints, ids: Ints) -> Reals:
        """What `read` would give if no patch were closed by these ids. Go back with `undo` before reading on."""
        raise NotImplementedError(f"{type(self).__name__} has no cheaper guess")

    def rollback(self, rows: Ints, lengths: Ints) -> None:
        """Take rows back to where they had read so many ids, by CHUNK at the most, or to 0."""
        self.lengths[rows] = lengths

    def placed(self, rows: Ints, ids: Ints) -> NewTokens:
        """New ids at the positions after those of before, written down. Raises UsageError as `read` does."""
        rows, ids = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise UsageError(f"ids from {ids.min()} to {ids.max()}: all are at least 0 and below {self.vocabulary}")
        place = np.arange(len(rows))
        if len(rows) > 1:
            opens = np.ones(len(rows), bool)
            np.not_equal(rows[1:], rows[:-1], out=opens[1:])
            place -= np.maximum.accumulate(np.where(opens, place, 0))
        position = self.lengths[rows] + place
        if len(rows) and (int(position.max()) >= self.capacity or int(place.max()) >= self.chunk):
            raise UsageError(
                f"a sequence of {int(position.max()) + 1} ids in steps of up to {int(place.max()) + 1}: "
                f"this decoder has room for {self.capacity} ids per sequence, read {self.chunk} at a time"
            )
        self.ids[rows, position] = ids
        self.lengths[rows] = position + 1
        return NewTokens(rows, position, ids)

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return VOCAB if self.tokens is None else self.tokens.vocabulary

    @abc.abstractmethod
    def after(self, new: NewTokens) -> Any:
        """The logits after new ids, where they were computed; see `read`."""

    @property
    @abc.abstractmethod
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes when it is full."""

    @abc.abstractmethod
    def traffic(self, length: int) -> float:
        """Bytes of weights and caches that one more byte in every row reads, each having read `length` ids."""


@runtime_checkable
class EntropyDecoder(Protocol):
    """An entropy model over rows: what the module `entropy_decoder` of an architecture builds."""

    def entropies(self, new: NewTokens, history: History) -> Reals:
        """The entropy in nats of what follows each new id."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes."""
        ...

    def traffic(self, length: int) -> float:
        """See `Decoder`."""
        ...
