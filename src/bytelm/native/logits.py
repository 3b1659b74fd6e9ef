"""What coders need of logits, by the kernels: the same on every processor with the same `arithmetic`.

Without torch, and called for each byte that is decompressed: what is asked of ctypes is asked once for a library.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.native.library import library

Logits = NDArray[np.floating[Any]]
_EXACT = {np.dtype(np.float32): 0, np.dtype(np.float64): 1}


def frequencies(logits: Logits, total: int) -> NDArray[np.int64] | None:
    """Frequencies of symbols with such logits `[..., symbols]`: each at least 1, `total` together at the most.

    All 1 where a line has a NaN. None without kernels, or for numbers of another type than float32 and float64.
    """
    found, exact = library("kernels"), _EXACT.get(logits.dtype)
    if found is None or exact is None:
        return None
    logits, out = np.ascontiguousarray(logits), np.empty(logits.shape, np.int64)
    symbols = logits.shape[-1]
    count = logits.size // symbols
    _typed(found).bytelm_frequencies(_address(logits), count, symbols, total, _address(out), exact)
    return out


def log_probabilities(logits: Logits, symbols: int) -> NDArray[np.float32] | None:
    """Natural log-probabilities `[lines, symbols]` of the first symbols, among these alone, of logits `[lines, more]`.

    None without kernels, for numbers of another type than float32 and float64, or fewer symbols.
    """
    found, exact = library("kernels"), _EXACT.get(logits.dtype)
    if found is None or exact is None or logits.shape[1] < symbols:
        return None
    logits, out = np.ascontiguousarray(logits), np.empty((len(logits), symbols), np.float32)
    shape = len(logits), logits.shape[1], symbols
    _typed(found).bytelm_log_probabilities(_address(logits), *shape, _address(out), exact)
    return out


@functools.cache
def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    """A library whose functions know what they take."""
    found.bytelm_frequencies.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64]
    found.bytelm_log_probabilities.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64]
    return found


def _address(array: NDArray[Any]) -> int:
    return array.__array_interface__["data"][0]  # three times as fast as array.ctypes
