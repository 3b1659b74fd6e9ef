"""The constants of the memory: logistic, logarithm, exponential, rates and bit histories, by integer arithmetic alone.

No function of the C library takes part, so they are the same on every machine; the C++ kernel is given these very
arrays. Reals are fixed-point integers of 96 fractional bits (`ONE`), rounded once at the end.

Bit histories (Mahoney 2005, section 4.1): bounded counts (n0, n1) and the last bit. Of counts that contradict
the new bit more than two only about their logarithm remains, so that histories forget what no longer holds.
"""

from __future__ import annotations

import functools
from collections import deque

import numpy as np
from numpy.typing import NDArray

ONE = 1 << 96
NAT = 256  # steps of a nat in the logistic domain
WIDE = 12 * NAT  # which reaches from -WIDE to WIDE - 1
BITS = 22  # of a probability
HALF, WHOLE = 1 << BITS - 1, 1 << BITS
FINE = 1024  # steps of a nat of the network's logarithms
LOWEST = 24 * FINE - 1  # what is less probable than this is as probable
LN2 = 46516320  # ln 2, in steps of FINE and 16 fractional bits
MOST = 48  # of one bit in a history without the other; by how often the other came:
BOUNDS = (MOST, 40, 14, 7, 5, 4)


def rounded(numerator: int, denominator: int) -> int:
    """The quotient, rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def exponential(numerator: int, denominator: int) -> int:
    """e to a power between 0 and 1, as a fixed-point number: the series."""
    total = term = ONE
    for n in range(1, 40):
        term = term * numerator // (denominator * n)
        total += term
    return total


@functools.cache
def logarithms(most: int) -> list[int]:
    """ln n of n = 1, 2, ... most, as fixed-point numbers: ln(n + 1) - ln n = 2 artanh(1 / (2 n + 1)); [0] is unused."""
    found = [0, 0]
    for n in range(1, most):
        total, power, k, square = 0, ONE // (2 * n + 1), 1, (2 * n + 1) ** 2
        while power:
            total += power // k
            power //= square
            k += 2
        found.append(found[-1] + 2 * total)
    return found


def powers(base: int, count: int) -> list[int]:
    """base^0, base^1, ... of a fixed-point number."""
    found = [ONE]
    while len(found) < count:
        found.append(found[-1] * base >> 96)
    return found


def squash() -> NDArray[np.int32]:
    """1 / (1 + e^-x), in 2^-22, of x = -WIDE ... WIDE - 1 steps of a nat."""
    grown = powers(exponential(1, NAT), WIDE + 1)
    of = [rounded(WHOLE * ONE, ONE + grown[-x]) for x in range(-WIDE, 1)]
    return np.array(of + [WHOLE - p for p in reversed(of[1:-1])], np.int32)


def stretch() -> NDArray[np.int16]:
    """ln(p / (1 - p)), in steps of a nat, of the middles of 4096 intervals of p."""
    ln = logarithms(8192)
    return np.array([rounded((ln[2 * p + 1] - ln[8191 - 2 * p]) * NAT, ONE) for p in range(4096)], np.int16)


def mantissas() -> NDArray[np.int32]:
    """ln(1 + (m + 1/2) / 2048), in steps of FINE, of m = 0 ... 2047."""
    ln = logarithms(8192)
    return np.array([rounded((ln[4097 + 2 * m] - ln[4096]) * FINE, ONE) for m in range(2048)], np.int32)


def falling(denominator: int, count: int) -> NDArray[np.uint32]:
    """e^(-i / denominator), in 2^-31."""
    inverse = ONE * ONE // exponential(1, denominator)
    return np.array([rounded(p << 31, ONE) for p in powers(inverse, count)], np.uint32)


def rates() -> NDArray[np.int32]:
    """1 / (n + 3/2), in 2^-16, of n = 0 ... 1023: the share of the newest observation after n."""
    return np.array([rounded(1 << 17, 2 * n + 3) for n in range(1024)], np.int32)


@functools.cache
def histories() -> tuple[NDArray[np.uint8], list[tuple[int, int, int]]]:
    """The state after each state and bit `[256, 2]`, and the states (n0, n1, last bit); state 0 has seen nothing."""
    states = [(0, 0, 0)]
    number = {states[0]: 0}
    after = np.zeros((256, 2), np.uint8)
    todo = deque(states)
    while todo:
        state = todo.popleft()
        for bit in (0, 1):
            new = _after(state, bit)
            if new not in number:
                number[new] = len(states)
                states.append(new)
                todo.append(new)
            after[number[state], bit] = number[new]
    return after, states


def _after(state: tuple[int, int, int], bit: int) -> tuple[int, int, int]:
    counts = [state[0], state[1]]
    counts[bit] += 1
    if counts[1 - bit] > 2:
        counts[1 - bit] = counts[1 - bit].bit_length()
    while not min(counts) < len(BOUNDS) or max(counts) > max(BOUNDS[min(counts)], min(counts)):
        counts[counts[0] <= counts[1]] -= 1
    return counts[0], counts[1], bit


def expected() -> NDArray[np.uint32]:
    """The probability of a 1 after each history before any is learnt, in 2^-22 above ten bits of zeros `[256]`."""
    made = [(rounded((10 * n1 + 4) << BITS, 10 * (n0 + n1) + 8) << 10) for n0, n1, _ in histories()[1]]
    return np.array(made + [HALF << 10] * (256 - len(made)), np.uint32)


@functools.cache
def blob() -> NDArray[np.uint8]:
    """All tables one after the other, as `struct Tables` of native/online_state.h has them."""
    every = (squash(), stretch(), mantissas(), falling(4, 128), falling(FINE, 256), rates(), histories()[0])
    return np.concatenate([np.ascontiguousarray(table).view(np.uint8).reshape(-1) for table in every])
