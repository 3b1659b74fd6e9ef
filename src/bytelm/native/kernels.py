"""Python bindings of the kernels: the structures of the C++ headers, with arrays in place of addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from bytelm.errors import UsageError
from bytelm.native.library import library, reason
from bytelm.native.weights import checksum, quantised

F64, F32, BF16, I8 = range(4)
KINDS = {torch.float64: F64, torch.float32: F32, torch.bfloat16: BF16}
SIZES = (8, 4, 2, 1)  # bytes of a number of each kind
VECTOR = 64  # bytes of a vector on any processor; caches are laid out in whole ones
PANEL = 32  # rows of a matrix that are stored together
STEP = 64  # positions in a table of angles, see attention.h

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Packed copies of each weight, by quantization, with its checksum: weights may be changed in place."""

Ints = NDArray[np.int64]
Reals = NDArray[Any]  # float32, or float64 where everything is


class Matrix(ctypes.Structure):
    """A packed weight, and a reference that keeps its memory alive."""

    _fields_ = (
        *(("data", c_void_p), ("scale", c_void_p)),
        *((name, c_int64) for name in ("out", "in_", "kind", "streamed")),
    )
    held: tuple[Any, ...]
    rows: int

    @property
    def bytes(self) -> int:
        """Memory traffic in bytes of a product with it, without what fills up its last panel."""
        return int(self.rows * self.in_ * SIZES[self.kind] + (4 * self.rows if self.scale else 0))


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
        return np.zeros(shape, self.real if kind is None else dtypes[kind])

    def vector(self, weight: Tensor) -> NDArray[Any]:
        """A norm's weight, or a few rows of a table, as numbers to compute with."""
        return np.ascontiguousarray(weight.detach().to(torch.float64 if self.exact else torch.float32).numpy())

    def table(self, weight: Tensor) -> Matrix:
        """A weight that rows are taken from, as it is."""
        weight = weight.detach().contiguous()
        return _matrix(weight, weight.shape, None)

    def matrix(self, weight: Tensor, *, whole: bool = False, halves: bool = False) -> Matrix:
        """The weight `[out, in]` of a linear layer, as the kernels multiply with it; kept as long as the weight lives.

        It is rounded to what `weights` says unless it is to stay `whole`. `halves`: two layers one above the other,
        whose panels are to lie in turn.
        """
        rounded = None if whole or weight.dtype == torch.float64 else self.weights
        kept: dict[Any, tuple[bytes, Matrix]] | None = _packed.get(weight)
        if kept is None:
            kept = _packed[weight] = {}
        key, content = (rounded, halves, self.streamed), checksum(weight)
        if key not in kept or kept[key][0] != content:
            kept[key] = content, self.packed(weight.detach(), rounded, 2 if halves else 1)
        return kept[key][1]

    def packed(self, weight: Tensor, rounded: str | None, parts: int) -> Matrix:
        """A weight in the layout of matrix.h."""
        shape, scale = weight.shape, None
        if rounded == "int8":
            weight, scale = quantised(weight)
            scale = _in_panels(scale[:, None], parts).flatten()
        elif rounded == "bf16":
            weight = weight.to(torch.bfloat16)
        weight = _in_panels(weight, parts)
        out = shape[0] if parts == 1 else len(weight) * PANEL
        found = _matrix(weight, (out, shape[1]), scale, self.streamed)
        found.rows = shape[0]
        return found

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


def _in_panels(weight: Tensor, parts: int) -> Tensor:
    """`[parts · out, in]` as `[panels, in, rows]`, panels of the parts in turn, filled up with zeros."""
    out = weight.shape[0] // parts
    whole = F.pad(weight.unflatten(0, (parts, out)), (0, 0, 0, -out % PANEL))
    return whole.unflatten(1, (-1, PANEL)).permute(1, 0, 3, 2).flatten(0, 1).contiguous()


def _matrix(weight: Tensor, shape: Sequence[int], scale: Tensor | None, streamed: bool = False) -> Matrix:
    kind = I8 if scale is not None else KINDS[weight.dtype]
    found = Matrix(weight.data_ptr(), None if scale is None else scale.data_ptr(), *shape, kind, streamed)
    found.held, found.rows = (weight, scale), shape[0]
    return found


S = TypeVar("S", bound=ctypes.Structure)


def array_of(kind: type[S], items: Sequence[S]) -> ctypes.Array[S]:
    """An array of structures, as a pointer to the first one needs it."""
    return (kind * len(items))(*items)
