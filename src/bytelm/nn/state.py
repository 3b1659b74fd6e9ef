"""Selecting and concatenating rows of a state, for every architecture.

A state is a frozen dataclass whose fields are tensors `[batch, ...]`, other such dataclasses, tuples of those, or
None. Where two states disagree in the second axis of a tensor, that axis is time and is aligned on the right: the
last slot is the newest, and the shorter one is filled up on the left with zeros, which no model ever looks at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.transfer import to_device


def map_state(function: Callable[..., Tensor], *states: Any) -> Any:
    """Apply `function` to corresponding tensors of states of one type, and rebuild that type from the results."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(*states)
    if isinstance(first, tuple):
        return tuple(map_state(function, *parts) for parts in zip(*states, strict=True))
    fields = [f.name for f in dataclasses.fields(first)]
    return type(first)(**{f: map_state(function, *(getattr(s, f) for s in states)) for f in fields})


def take_rows(state: Any, rows: Tensor) -> Any:
    """The state of the given rows (int64 indices, any order, repeats allowed)."""
    return map_state(lambda tensor: tensor[to_device(rows, tensor)], state)


def join_rows(states: Sequence[Any]) -> Any:
    """The state of all rows of several states, in order."""
    return map_state(lambda *tensors: torch.cat(align_right(tensors)), *states)


def put_rows(state: Any, rows: Tensor, new: Any) -> Any:
    """The state with the given rows replaced by those of `new`."""

    def put(old: Tensor, fresh: Tensor) -> Tensor:
        old, fresh = align_right((old.to(fresh.dtype), fresh))  # a state that has read nothing is float32
        return old.index_copy(0, to_device(rows, old), fresh)

    return map_state(put, state, new)


def align_right(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors `[rows, time, ...]` filled up on the left with zeros to the longest time among them."""
    if tensors[0].ndim < 2:
        return list(tensors)
    longest = max(t.shape[1] for t in tensors)
    return [F.pad(t, (0, 0) * (t.ndim - 2) + (longest - t.shape[1], 0)) for t in tensors]
