"""The id space, the one division that makes bits per byte, and how quantities are shown to people.

ids 0..255 ARE the bytes; specials start at 256, so that every byte value is data and no padding is ever a byte.
(Meta's and Hugging Face's BLT put the specials first: theirs = (ours + 4) mod 260.)
"""

from __future__ import annotations

import math

BYTES = 256
PAD = 256  # no symbol at all: a position that does not exist (Meta's BOE)
BOS = 257  # opens every document, so that its first byte is scored like any other
EOS = 258  # closes every document
RESERVED = 259
VOCAB = 260
UNWRITTEN = (PAD, BOS, RESERVED)  # ids that are never generated

LN2 = math.log(2.0)
UNIFORM = 8.0  # bits per byte of a model that guesses: one that takes as many or more has learned nothing


def bits_per_byte(nats: float, count: int) -> float:
    """Summed nats over counted bytes, as bits per byte: the only place where the two sums are divided."""
    if count <= 0:
        raise ValueError(f"bits per byte needs at least one counted byte, got {count}")
    return nats / LN2 / count


def show_bytes(count: float | int) -> str:
    """A count of bytes for people: 612 B, 61.2 kB, 1.50 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def show_count(count: float | int) -> str:
    """A count of parameters or operations for people: 873, 1.2K, 4.53B."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.4g}T"


def show_seconds(seconds: float | int) -> str:
    """A duration for people: 0:07, 3:42, 1:02:09."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def show_power(value: float) -> str:
    """A large number as 2e13."""
    return f"{value:.3g}".replace("e+", "e")
