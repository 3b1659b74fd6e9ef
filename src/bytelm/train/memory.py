"""Memory that a long sequence frees goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_MMAP_THRESHOLD = -3  # the number of this setting in glibc's malloc.h
LARGE = 1 << 20  # bytes


def give_back_large_blocks() -> None:
    """Have blocks of 1 MiB and more mapped one by one, where the C library is glibc; elsewhere do nothing.

    By itself glibc learns to keep blocks of up to 32 MiB in its heap. When patches are computed piece by piece, the
    little that is kept of each pins what is freed around it: 28 kB a byte for two layers of width 768, where what is
    kept comes to 1 kB (docs/log.md). Mapping costs page faults, so it is for runs that spare memory.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, LARGE)
