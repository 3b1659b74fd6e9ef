"""The next sample of audio: interleaved channels of 16-bit little-endian samples, each with an adaptive linear filter.

wave:1:128:0 is of 1 channel. The filter expects a sample by the sixteen before it, as normalised least mean squares
(Widrow and Hoff 1960) learns to with a step of 128 / 256; it sees what is left of samples after 15/16 of the one before
are taken off, by which it learns faster. All is in integers: weights are in units of 2^-16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bytelm.online.arena import Arena

TAPS, STATE = 16, 144  # samples that are looked at; bytes of a channel's state
CODE, PARAMETERS, BYTES = 10, ((1, 7), (1, 255), (0, 1)), 7 * STATE
LOUDEST, HEAVIEST = 32767, 1 << 24


def context(arena: Arena, own: int, parameter: int) -> int:
    """What a byte is expected to be, and how wrong the last samples were; without or with finer bits, by detail."""
    expected, wrong = channel(arena, own, parameter)[:2].tolist()
    scale, coarse = min(wrong.bit_length(), 15), parameter >> 11
    if arena.position % 2 == 0:
        seen = expected >> 2 & 0x3FFF if coarse else expected & 255
        return seen << 5 | scale << 1
    apart = expected - arena.last(1)
    high = apart + 128 >> 8 & 255
    return (high if coarse else high << 5 | (apart & 255) >> 3) << 5 | scale << 1 | 1


def channel(arena: Arena, own: int, parameter: int) -> NDArray[np.int32]:
    """The state of the channel of the next byte: expected, 16 times the mean error, newest; what is left; weights."""
    at = own + STATE * (arena.position // 2 % (parameter & 7))
    return arena.data[at : at + STATE].view(np.int32)


def note(arena: Arena, own: int, parameter: int, byte: int) -> None:
    """Learn a whole sample, and expect the next one of its channel."""
    if arena.position % 2 == 0:
        return
    state, step = channel(arena, own, parameter), parameter >> 3 & 255
    expected, wrong, newest, _, *both = state.tolist()
    left, weights = both[:TAPS], both[TAPS:]
    sample = (arena.last(1) | byte << 8 ^ 0x8000) - 0x8000
    error = sample - expected
    share = (abs(error) * step << 24) // (1024 + sum(x * x for x in left)) * (1 if error > 0 else -1)
    weights = [min(max(w + (share * x >> 16), -HEAVIEST), HEAVIEST) for w, x in zip(weights, left, strict=True)]
    left = [sample - (15 * newest >> 4), *left[:-1]]
    filtered = sum(w * x for w, x in zip(weights, left, strict=True)) + 32768 >> 16
    expected = min(max((15 * sample >> 4) + filtered, -LOUDEST - 1), LOUDEST)
    state[:] = [expected, wrong + (16 * abs(error) - wrong >> 3), sample, 0, *left, *weights]
