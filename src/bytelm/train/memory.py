"""Memory that a long sequence frees goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_MMAP_THRESHOLD = -3  # the number of this setting in glibc's malloc.h
LARGE = 4 << 20  # bytes


def give_back_large_blocks() -> None:
    """Have blocks of 4 MiB and more mapped one by one, where the C library is glibc; elsewhere do nothing.

    By itself glibc learns to keep blocks of up to 32 MiB in its heap. When patches are computed piece by piece, the
    little that is kept of each pins what is freed around it: 20 kB a byte for one layer of width 768, where what is
    kept comes to 0.5 kB (docs/log.md). Mapping costs page faults, so it is for runs that spare memory.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, LARGE)
