"""Reductions over segments of bytes."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from bytelm.nn import fused


def segment_max(
    values: Float[Tensor, "slots ..."], segment: Int[Tensor, " slots"], segments: int
) -> Float[Tensor, "segments ..."]:
    """The maximum of each segment; -inf for empty segments."""
    index = segment.reshape((-1,) + (1,) * (values.ndim - 1)).expand_as(values)
    empty = values.new_full((segments, *values.shape[1:]), float("-inf"))
    return empty.scatter_reduce(0, index, values, "amax")


def run_maxima(
    values: Float[Tensor, "slots dim"], segment: Int[Tensor, " slots"], runs: int
) -> Float[Tensor, "runs dim"]:
    """The maximum of each run of adjacent slots, 0 for empty runs; slots of no run have the number `runs`."""
    if runs and (device := fused.kernels(values)):
        return device.run_maxima(values, segment, runs)
    highest = segment_max(values, segment, runs + 1)[:-1]
    return highest.masked_fill(highest == float("-inf"), 0.0)


def segment_sum(
    values: Float[Tensor, "slots ..."], segment: Int[Tensor, " slots"], segments: int
) -> Float[Tensor, "segments ..."]:
    """The sum of each segment, in slot order."""
    return values.new_zeros((segments, *values.shape[1:])).index_add(0, segment, values)
