"""Python bindings of the kernels: the structures of the C++ headers, with arrays in place of addresses."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm.errors import UsageError
from bytelm.native import packing
from bytelm.native.library import library, reason
from bytelm.native.packing import BF16, F32, F64, Matrix

VECTOR = 64  # bytes of a vector on any processor; caches are laid out in whole ones
SPARSE = 1 << 22  # bytes from which arrays of caches are given memory page by page: where numpy asks for huge pages
STEP = 64  # positions in a table of angles, see attention.h

Ints = NDArray[np.int64]
Reals = NDArray[Any]  # float32, or float64 where everything is


class Heads(ctypes.Structure):
    """See attention.h."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "head_dim", "slots", "window")),
        *(("frequencies", c_void_p), ("angles", c_void_p)),
    )


class Layer(ctypes.Structure):
    """See stack.h."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("feed_forward_norm", c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
        *((name, c_void_p) for name in ("keys", "values", "kept", "query_norm")),
        ("query", Matrix),
        ("cross_out", Matrix),
        ("key_norm", c_void_p),
        ("key_value", Matrix),
        ("parts", c_void_p),
    )


class Stack(ctypes.Structure):
    """See stack.h."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "dim", "hidden", "kind")),
        ("shape", Heads),
        ("eps", c_double),
        *((name, c_int64) for name in ("kept_slots", "cross_heads", "cross_parts", "cross_slots")),
        ("layer", POINTER(Layer)),
    )


class Tokens(ctypes.Structure):
    """See attention.h."""

    _fields_ = (("count", c_int64), *((name, c_void_p) for name in ("row", "position", "start", "patch", "wanted")))


class History(ctypes.Structure):
    """See patches.h."""

    _fields_ = (("ids", c_void_p), ("slots", c_int64), ("unread", c_int64))


class Ngrams(ctypes.Structure):
    """See patches.h."""

    held: tuple[Any, ...]

    _fields_ = (
        ("table", Matrix),
        ("sizes", c_void_p),
        ("powers", c_void_p),
        *((name, c_int64) for name in ("size_count", "functions", "longest", "rows", "offset", "vocab")),
    )


class Counted(ctypes.Structure):
    """See patches.h."""

    _fields_ = (
        ("tables", c_void_p),
        *((name, c_int64) for name in ("order", "rows", "multiplier", "bytes", "newline", "unread")),
    )


class Rule(ctypes.Structure):
    """See patches.h."""

    _fields_ = (
        ("scheme", c_int64),
        ("threshold", c_double),
        ("relative", c_double),
        *((name, c_int64) for name in ("longest", "singles", "spared", "eos")),
        *((name, c_void_p) for name in ("spacelike", "gap", "run", "closed", "first", "entropy")),
    )


class PoolLayer(ctypes.Structure):
    """See patches.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("bytes", "query_norm", "key_norm")),
        *((name, Matrix) for name in ("query", "key_value", "out")),
    )


class Pool(ctypes.Structure):
    """See patches.h."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "dim", "heads", "queries", "slots")),
        ("eps", c_double),
        ("split", Matrix),
        ("layer", POINTER(PoolLayer)),
    )


def address(array: NDArray[Any] | None) -> int | None:
    """The address of an array's data. Raises ValueError for one that is not contiguous."""
    if array is None:
        return None
    found = array.__array_interface__  # three times as fast as array.ctypes
    if found["strides"] is not None:
        raise ValueError(f"an array of shape {array.shape} and strides {array.strides} is not contiguous")
    return found["data"][0]


def tokens(
    row: Ints,
    position: Ints,
    start: Ints | None = None,
    patch: Ints | None = None,
    wanted: NDArray[np.bool_] | None = None,
) -> Tokens:
    """New positions of any rows, those of one row together and in order. The arrays must outlive what is returned."""
    return Tokens(len(row), *map(address, (row, position, start, patch, wanted)))


@dataclass
class ThreadPool:
    """Number of threads of a product: at most `most`, fewer on a busy machine. Results do not depend on it."""

    most: int
    threads: int


K = TypeVar("K", bound="Kernels")


def untouched(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that take memory page by page, as they are used.

    numpy asks for huge pages: of a large array of caches, which is written here and there, each first touch would
    clear 2 MB, and soon all of it would be resident.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < SPARSE:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


@dataclass(frozen=True)
class Kernels:
    """The compiled functions, for numbers of one precision: float32, or float64 (`exact`)."""

    functions: ctypes.CDLL
    exact: bool
    thread_pool: ThreadPool
    weights: str | None
    """Quantization of linear layers: "bf16", "int8", or None."""
    streamed: bool = False
    """Whether the weights exceed the processor's caches."""

    @classmethod
    def open(
        cls: type[K],
        exact: bool = False,
        weights: str | None = None,
        streamed: bool = False,
        thread_pool: ThreadPool | None = None,
    ) -> K:
        """The kernels of this machine, with all of torch's threads. Raises UsageError if there are none."""
        functions = library("kernels")
        if functions is None:
            raise UsageError(reason("kernels"))
        integers, addresses = c_int64, c_void_p
        functions.bytelm_linear.argtypes = [
            *(addresses, addresses, c_double, addresses, addresses, integers, integers, integers)
        ]
        most = torch.get_num_threads()
        return cls(functions, exact, thread_pool or ThreadPool(most, most), weights, streamed)

    @property
    def real(self) -> type[np.floating[Any]]:
        """The type of all numbers but weights and caches."""
        return np.float64 if self.exact else np.float32

    @property
    def cached(self) -> int:
        """The dtype of caches: as the weights', but never below 16 bits."""
        return F64 if self.exact else BF16 if self.weights else F32

    @property
    def lanes(self) -> int:
        """Adjacent positions in a cache."""
        return VECTOR // (8 if self.exact else 4)

    def zeros(self, *shape: int, kind: int | None = None) -> NDArray[Any]:
        """Room for numbers of a kind, or of those that are computed with; the system gives memory when it is used."""
        dtypes = (np.float64, np.float32, np.uint16, np.int8)
        return untouched(shape, np.dtype(self.real if kind is None else dtypes[kind]))

    def vector(self, weight: Tensor) -> NDArray[Any]:
        """A norm's weight, or a few rows of a table, as numbers to compute with."""
        return np.ascontiguousarray(weight.detach().to(torch.float64 if self.exact else torch.float32).numpy())

    def table(self, weight: Tensor) -> Matrix:
        """A weight that rows are taken from, as it is."""
        return packing.held(weight) or packing.table(weight.detach().contiguous())

    def matrix(self, weight: Tensor, *, whole: bool = False, halves: bool = False) -> Matrix:
        """The weight `[out, in]` of a linear layer, as the kernels multiply with it; kept as long as the weight lives.

        It is rounded to what `weights` says unless it is to stay `whole`. `halves`: see `packing.packed`.
        """
        if (found := packing.held(weight)) is not None:
            return found
        rounded = None if whole or weight.dtype == torch.float64 else self.weights
        return packing.cached(weight, rounded, halves, self.streamed)

    def run(self, stack: Stack, batch: Tokens, x: Reals) -> None:
        """All layers over new positions `x` [tokens, dim], in place."""
        self.functions.bytelm_stack(byref(stack), byref(batch), c_void_p(address(x)), self._exact, self._threads)

    def linear(self, matrix: Matrix, x: Reals, norm: NDArray[Any] | None = None, eps: float = 0.0) -> Reals:
        """`[n, out]` from contiguous `[n, in]`, RMS-normed before if there is a weight for it."""
        out = np.empty((len(x), matrix.out), self.real)
        self.functions.bytelm_linear(
            byref(matrix),
            address(norm),
            eps,
            address(x),
            address(out),
            len(x),
            int(self.exact),
            self.thread_pool.threads,
        )
        return out

    def normed(self, x: Reals, weight: NDArray[Any], eps: float) -> Reals:
        """Contiguous lines `[n, dim]` after RMSNorm."""
        out = np.empty_like(x)
        n, dim = map(c_int64, x.shape)
        at = [c_void_p(address(array)) for array in (weight, x, out)]
        self.functions.bytelm_norm(at[0], c_double(eps), at[1], at[2], n, dim, self._exact)
        return out

    def dots(self, x: Reals, y: Reals) -> Reals:
        """The dot product of each of contiguous lines `[n, dim]` with that of `y`."""
        out = np.empty(len(x), self.real)
        n, dim = map(c_int64, x.shape)
        at = [c_void_p(address(array)) for array in (x, y)]
        self.functions.bytelm_dots(*at, n, dim, c_void_p(address(out)), self._exact)
        return out

    def turns(self, angles: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cosines and sines of contiguous angles, of any shape, below 2^26."""
        found = np.empty_like(angles), np.empty_like(angles)
        at = [c_void_p(address(array)) for array in (angles, *found)]
        self.functions.bytelm_turns(at[0], c_int64(angles.size), *at[1:])
        return found

    def parts(self, stack: Stack, x: Reals, row: Ints, patch: Ints) -> None:
        """Keys and values of patches `[n, parts · dim]` for every cross-attention of a stack."""
        places = c_void_p(address(row)), c_void_p(address(patch))
        at = c_void_p(address(x))
        self.functions.bytelm_parts(byref(stack), at, *places, c_int64(len(row)), self._exact, self._threads)

    def embed(self, table: Matrix, ids: Ints, x: Reals | None = None) -> Reals:
        """Rows of a table, added to `x` if there is one."""
        add = x is not None
        out = np.empty((len(ids), table.in_), self.real) if x is None else x
        at = c_void_p(address(ids)), c_void_p(address(out))
        self.functions.bytelm_embed(byref(table), *at, c_int64(len(ids)), c_int64(add), self._exact)
        return out

    def hashes(self, ngrams: Ngrams, history: History, batch: Tokens) -> Ints:
        """The rows of the tables `[tokens, tables]` of the n-grams that end at new positions."""
        out = np.empty((batch.count, ngrams.functions * ngrams.size_count), np.int64)
        self.functions.bytelm_hashes(byref(ngrams), byref(history), byref(batch), c_void_p(address(out)))
        return out

    def bags(self, table: Matrix, index: Ints, x: Reals) -> None:
        """Add rows `index` [n, some] of a table to each of `x` [n, dim]."""
        n, some = map(c_int64, index.shape)
        at = c_void_p(address(index)), c_void_p(address(x))
        self.functions.bytelm_bags(byref(table), *at, n, some, self._exact)

    def ngrams(self, ngrams: Ngrams, history: History, batch: Tokens, x: Reals) -> None:
        """Add the n-gram embeddings of the ids at new positions to `x`."""
        at = c_void_p(address(x))
        self.functions.bytelm_ngrams(byref(ngrams), byref(history), byref(batch), at, self._exact)

    def counted(self, entropy_model: Counted, history: History, batch: Tokens) -> Reals:
        """Entropies after new positions, looked up."""
        out = np.empty(batch.count, self.real)
        at = c_void_p(address(out))
        self.functions.bytelm_counted(byref(entropy_model), byref(history), byref(batch), at, self._exact)
        return out

    def entropies(self, logits: Reals) -> Reals:
        """The entropy in nats of each row of logits."""
        out = np.empty(len(logits), self.real)
        n, vocab = map(c_int64, logits.shape)
        self.functions.bytelm_entropy(c_void_p(address(logits)), n, vocab, c_void_p(address(out)), self._exact)
        return out

    def decide(self, rule: Rule, history: History, batch: Tokens, entropy: Reals | None) -> None:
        """Where patches open after new positions, written down by position."""
        at = c_void_p(address(entropy))
        self.functions.bytelm_decide(byref(rule), byref(history), byref(batch), at, self._exact)

    def pool(self, pool: Pool, row: Ints, first: Ints, last: Ints) -> Reals:
        """Patches `[n, queries · dim]` from their bytes at positions first..last of a row."""
        out = np.empty((len(row), pool.queries * pool.dim), self.real)
        places = [c_void_p(address(x)) for x in (row, first, last)]
        n = c_int64(len(row))
        self.functions.bytelm_pool(byref(pool), *places, n, c_void_p(address(out)), self._exact, self._threads)
        return out

    @property
    def _exact(self) -> c_int64:
        return c_int64(self.exact)

    @property
    def _threads(self) -> c_int64:
        return c_int64(self.thread_pool.threads)


S = TypeVar("S", bound=ctypes.Structure)


def array_of(kind: type[S], items: Sequence[S]) -> ctypes.Array[S]:
    """An array of structures, as a pointer to the first one needs it."""
    return (kind * len(items))(*items)
