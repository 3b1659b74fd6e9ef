"""Python bindings of the training kernels: the structures of the C++ headers, with tensors in place of addresses."""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from bytelm.native.library import library

LINES = 64  # that one sum for a norm's weight is made of, see pointwise.h


class Strides(ctypes.Structure):
    """See attend.h."""

    _fields_ = tuple((name, c_int64) for name in ("row", "place", "head"))


class Attend(ctypes.Structure):
    """See attend.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "head_dim", "queries", "slots")),
        *((name, c_void_p) for name in ("query", "keys", "values")),
        *((name, Strides) for name in ("of_query", "of_keys", "of_values")),
        *(("first", c_void_p), ("first_row", c_int64)),
        *((name, c_void_p) for name in ("out", "lse", "d_out", "d_query", "d_keys", "d_values")),
    )


class Crossed(ctypes.Structure):
    """See crossed.h."""

    _fields_ = (
        *((name, c_int64) for name in ("bytes", "patches", "parts", "heads", "dim")),
        *((name, c_void_p) for name in ("patch", "query", "keys", "values", "weights", "out")),
        *((name, c_void_p) for name in ("d_out", "d_query", "d_keys", "d_values")),
    )


class Turn(ctypes.Structure):
    """See pointwise.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "places", "heads", "half", "row", "place")),
        *(("cosines", c_void_p), ("sines", c_void_p), ("angle_row", c_int64)),
    )


class Rows(ctypes.Structure):
    """See pointwise.h."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "dim")),
        *((name, c_void_p) for name in ("index", "slope", "weight", "square")),
        *((name, c_double) for name in ("rate", "beta2", "eps")),
        ("rowwise", c_int64),
    )


@functools.cache
def functions() -> ctypes.CDLL | None:
    """The compiled functions; None where they could not be compiled. They compute the same on every processor."""
    return library("training")


def multiplies_bfloat16() -> bool:
    """Whether this processor has products in bfloat16, without which plain torch is faster in it."""
    found = functions()
    return found is not None and bool(found.bytelm_native_pairs())


def avoids_mkl() -> bool:
    """Whether this processor has AVX-512, and MKL does not use it: that of another maker than MKL's."""
    found = functions()
    return found is not None and bool(found.bytelm_avoids_mkl())


def call(name: str, *arguments: ctypes.Structure | Tensor | float | None) -> None:
    """Call a function with structures, tensors, integers and floats, on as many threads as torch has."""
    found = functions()
    assert found is not None
    getattr(found, name)(*map(_argument, arguments), c_int64(torch.get_num_threads()))


def _argument(value: ctypes.Structure | Tensor | float | None) -> object:
    match value:
        case Tensor():
            return c_void_p(value.data_ptr())
        case int():
            return c_int64(value)
        case float():
            return c_double(value)
        case None:
            return c_void_p()
        case _:
            return byref(value)


def strides(x: Tensor) -> Strides:
    """Of a tensor `[rows, places, heads, head_dim]`."""
    return Strides(*x.stride()[:3])
