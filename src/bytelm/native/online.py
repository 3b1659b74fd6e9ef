"""Python bindings of the memory's kernel: its entry points with the types of their arguments."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p

from bytelm.native.library import library

SIGNATURES: dict[str, tuple[type[c_int64] | type[c_void_p] | None, tuple[type[c_int64] | type[c_void_p], ...]]] = {
    "read": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "nodes": (None, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "encode": (c_int64, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
    "decode": (c_int64, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "journal": (c_void_p, ()),
    "forget": (None, (c_void_p,)),
    "mark": (None, (c_void_p,)),
    "unmark": (None, (c_void_p, c_void_p)),
}


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The library `online`, its functions typed; None where there is none."""
    found = library("online")
    return None if found is None else typed(found)


def typed(found: ctypes.CDLL) -> ctypes.CDLL:
    """A library whose functions know what they take."""
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, f"bytelm_online_{name}")
        function.restype, function.argtypes = result, arguments
    return found
