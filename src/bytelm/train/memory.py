"""What the C library does with large blocks that are freed: keep them for the next step, or give them back."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the numbers of these settings in glibc's malloc.h
LARGE = 1 << 20  # bytes
ANY = (1 << 31) - 1  # bytes: the settings are 32-bit integers


def give_back_large_blocks() -> None:
    """Have blocks of 1 MiB and more mapped one by one, where the C library is glibc; elsewhere do nothing.

    By itself glibc learns to keep blocks of up to 32 MiB in its heap. When patches are computed piece by piece, the
    little that is kept of each pins what is freed around it: 28 kB a byte for two layers of width 768, where what is
    kept comes to 1 kB (docs/log.md). Mapping costs page faults, so it is for runs that spare memory.
    """
    _set(_MMAP_THRESHOLD, LARGE)


def keep_large_blocks() -> None:
    """Have freed blocks of up to 2 GiB kept for the next step, where the C library is glibc; elsewhere do nothing.

    By itself glibc maps those above 32 MiB anew each time, and every page of them costs a fault: a tenth of a step with
    a gradient of 38 MB for n-gram tables (docs/log.md).
    """
    _set(_MMAP_THRESHOLD, ANY)
    _set(_TRIM_THRESHOLD, ANY)


def _set(setting: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(setting, value)
