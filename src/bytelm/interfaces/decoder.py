"""The interface of decoders: a fixed batch of sequences (rows), read in chunks or byte by byte, with rollback."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bytelm.data.bpe import Tokens
from bytelm.errors import UsageError
from bytelm.native.kernels import History, Kernels, ThreadPool
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.transfer import to_host
from bytelm.units import VOCAB

CHUNK = 256  # ids of one row per call at most: what ring buffers hold beyond their window

Ints = NDArray[np.int64]
Reals = NDArray[Any]
"""float32, or float64 for a model in float64"""
Wanted = NDArray[np.bool_]


@dataclass(frozen=True)
class NewTokens:
    """Ids to be read, grouped by row, in order. Each array is `[n]`."""

    row: Ints
    position: Ints
    ids: Ints
    opens: NDArray[np.bool_] | None = None
    """Whether the next id opens a patch, where that was decided before."""

    def __getitem__(self, which: Any) -> NewTokens:
        """Some of them."""
        opens = None if self.opens is None else self.opens[which]
        return NewTokens(self.row[which], self.position[which], self.ids[which], opens)


@runtime_checkable
class Backend(Protocol):
    """What computes for a decoder. Activations are arrays on the host, or tensors on a device.

    Integer inputs are host arrays. The results of `table`, `matrix` and `vector` are arguments of the other methods.
    """

    @property
    def chunk(self) -> int:
        """See `Decoder.chunk`; caches of a window hold so many positions beyond it."""
        ...

    @property
    def repeats(self) -> bool:
        """See `Decoder.repeats`."""
        ...

    @property
    def prefills(self) -> bool:
        """Whether stacks compute their last block for wanted positions alone."""
        ...

    @property
    def thread_pool(self) -> ThreadPool | None:
        """See `Decoder.thread_pool`."""
        ...

    @property
    def on_device(self) -> bool:
        """Whether activations are tensors on a device."""
        ...

    @property
    def host(self) -> Kernels:
        """The host kernels that decide patch boundaries and look up n-grams."""
        ...

    def precise(self) -> Backend:
        """The same without quantization."""
        ...

    def vector(self, weight: Tensor) -> Any:
        """A norm's weight, or a few rows of a table, in the compute dtype."""
        ...

    def table(self, weight: Tensor) -> Any:
        """An embedding table, not quantized."""
        ...

    def matrix(self, weight: Tensor, *, whole: bool = False) -> Any:
        """The weight `[out, in]` of a linear layer, quantized unless `whole`; has `bytes`."""
        ...

    def embed(self, table: Any, ids: Ints) -> Any:
        """Rows of a table `[n, dim]`."""
        ...

    def linear(self, matrix: Any, x: Any, norm: Any = None, eps: float = 0.0) -> Any:
        """`[n, out]` from `[n, in]`, after RMSNorm if `norm` is given, as before logits."""
        ...

    def normed(self, x: Any, weight: Any, eps: float) -> Any:
        """RMSNorm of `[n, dim]`."""
        ...

    def instead(self, x: Any, where: NDArray[np.bool_], line: Any) -> Any:
        """`x` [n, dim] with `line` in the rows `where`."""
        ...

    def entropies(self, logits: Any) -> Reals:
        """The entropy in nats of each row of logits, on the host."""
        ...

    def layers(self, *args: Any, **options: Any) -> Any:
        """A stack over rows, see `stacks.Layers`."""
        ...

    def hashed(self, embed: NgramEmbedding, ids: Ints) -> Any:
        """The n-grams of an embedding that has some, over the ids of rows, see `decoding.ngrams`."""
        ...


def fetched(x: NDArray[Any] | Tensor) -> Reals:
    """Activations on the host; from a device, the one synchronisation of a step."""
    return x if isinstance(x, np.ndarray) else to_host(x).numpy()


def with_ngrams(x: Any, ngrams: Any, new: NewTokens) -> tuple[Any, Any]:
    """Vectors `x` of new ids with their n-grams, and what these are for the output; None where there is nothing.

    `ngrams`: of `Backend.hashed`, or None.
    """
    if ngrams is None:
        return x, None
    ngrams.prefetch(new)
    return ngrams.added(x, new)


class Decoder(abc.ABC):
    """A model that generates in a fixed number of rows, each one document: BOS at position 0, then its bytes.

    Caches are indexed by position, so that rollback is a new length, and a new document a rollback to 0.
    """

    drafts = False
    """Whether `draft` is supported: a cheaper guess at the logits of `read`."""
    prefills = False
    """Whether there is `wanted_logits`, which computes less for the ids of prompts."""
    rolls_back = True
    """Whether rows return to shorter lengths than they have read; else to 0 alone."""
    repeats = True
    """Whether results are batch-invariant and chunking-invariant: bitwise identical in any batch and any chunks."""
    thread_pool: ThreadPool | None = None
    """The threads of the kernels, if any."""
    chunk = CHUNK
    """Ids of one row per call at most."""
    tokens: Tokens | None = None
    """The tokens of a model over tokens."""

    @staticmethod
    def unsupported(model: Any) -> str:
        """Why a model of the architecture has no such decoder, in words; empty where it has."""
        return ""

    def __init__(self, rows: int, capacity: int, backend: Backend | None = None) -> None:
        self.rows, self.capacity = rows, capacity
        if backend:
            self.thread_pool, self.chunk, self.repeats = backend.thread_pool, backend.chunk, backend.repeats
            self.prefills = self.prefills and backend.prefills
        self.lengths: Ints = np.zeros(rows, np.int64)
        """Ids that each row has read."""
        self.ids: Ints = np.zeros((rows, capacity), np.int64)

    def read(
        self, rows: Ints, ids: Ints, wanted: Wanted | None = None, opens: NDArray[np.bool_] | None = None
    ) -> Reals:
        """Logits `[n, vocab]` after new ids `[n]`, sorted by row, at most `chunk` per row. Raises UsageError.

        `wanted` [n]: the ids whose logits are returned. What only the others' logits need is not computed, so that
        rows cannot be rolled back to before these ids. `opens` [n]: whether the next id opens a patch, instead of
        asking the patcher; for all ids of a row or none.
        """
        new = self.append(rows, ids, opens)
        if wanted is None or wanted.all():
            return fetched(self.logits_after(new))
        if self.prefills:
            return fetched(self.wanted_logits(new, wanted))
        return fetched(self.logits_after(new))[wanted]

    def draft(self, rows: Ints, ids: Ints) -> Reals:
        """The logits of `read` if these ids completed no patch. Call `rollback` before reading further."""
        raise NotImplementedError(f"{type(self).__name__} has no drafts")

    def rollback(self, rows: Ints, lengths: Ints) -> None:
        """Return rows to shorter lengths: by at most CHUNK ids, or to 0."""
        self.lengths[rows] = lengths

    def reusable(self, row: int, length: int) -> int:
        """The longest prefix of up to `length` ids that a row can be rolled back to."""
        return length if self.lengths[row] - length <= self.chunk else 0

    def depth(self, row: int) -> Ints | None:
        """See `Chunking.depth`, of all that a row has read; None where a model does not learn its boundaries."""
        return None

    def append(self, rows: Ints, ids: Ints, opens: NDArray[np.bool_] | None = None) -> NewTokens:
        """Append new ids to their rows. Raises UsageError as `read` does."""
        rows, ids = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise UsageError(f"ids from {ids.min()} to {ids.max()}: must be at least 0 and below {self.vocabulary}")
        place = np.arange(len(rows))
        if len(rows) > 1:
            begins = np.ones(len(rows), bool)
            np.not_equal(rows[1:], rows[:-1], out=begins[1:])
            place -= np.maximum.accumulate(np.where(begins, place, 0))
        position = self.lengths[rows] + place
        if len(rows) and (int(position.max()) >= self.capacity or int(place.max()) >= self.chunk):
            raise UsageError(
                f"a sequence of {int(position.max()) + 1} ids in steps of up to {int(place.max()) + 1}: "
                f"this decoder has room for {self.capacity} ids per sequence, read {self.chunk} at a time"
            )
        self.ids[rows, position] = ids
        self.lengths[rows] = position + 1
        return NewTokens(rows, position, ids, opens)

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return VOCAB if self.tokens is None else self.tokens.vocabulary

    @abc.abstractmethod
    def logits_after(self, new: NewTokens) -> Any:
        """The logits after new ids, as the backend has them; see `read`."""

    def wanted_logits(self, new: NewTokens, wanted: Wanted | None) -> Any:
        """Those after wanted ids, or after all for None; see `read`."""
        raise NotImplementedError(f"{type(self).__name__} computes all logits")

    @property
    @abc.abstractmethod
    def row_bytes(self) -> int:
        """Memory of one row, in bytes."""

    @abc.abstractmethod
    def traffic(self, length: int) -> float:
        """Bytes of weights and caches read by a step of one byte in every row, after `length` ids."""


@runtime_checkable
class EntropyDecoder(Protocol):
    """An entropy model over rows, built by the module `entropy_decoder` of an architecture."""

    def entropies(self, new: NewTokens, history: History) -> Reals:
        """The next-byte entropy after each new id, in nats."""
        ...

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        ...

    def traffic(self, length: int) -> float:
        """See `Decoder`."""
        ...
