"""The kernels of `bytelm.nn` on the meta device, each counted as a pass over memory in a `roofline`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from roofline import Floor, size
from torch import Tensor

from bytelm.nn import fused, runs


class Pass(torch.autograd.Function):
    """A kernel, forward and backward: bytes read and written, and FLOPs."""

    @staticmethod
    def forward(ctx: Any, floor: Floor, name: str, make: Callable[..., Any], operations: float, *inputs: Tensor) -> Any:
        found = make(*inputs)
        made = found if isinstance(found, tuple) else (found,)
        ctx.floor, ctx.name, ctx.operations = floor, name, operations
        ctx.bytes = sum(map(size, made))
        ctx.save_for_backward(*inputs)
        floor.add(name, ctx.bytes + sum(map(size, inputs)), operations)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        inputs: Sequence[Tensor] = ctx.saved_tensors
        real = [x for x in inputs if x.is_floating_point()]
        ctx.floor.add(f"{ctx.name}, back", ctx.bytes + sum(map(size, (*inputs, *real))), 2.5 * ctx.operations)
        return (None, None, None, None, *(torch.empty_like(x) if x.is_floating_point() else None for x in inputs))


def kernels_of(floor: Floor) -> SimpleNamespace:
    """The functions of `fused.kernels`."""

    def one(name: str, make: Callable[..., Any], *inputs: Tensor) -> Any:
        return Pass.apply(floor, name, make, 0.0, *inputs)

    def hashes(ids: Tensor, starts: Tensor, recent: Tensor, rows: int, primes: Any, sizes: Any, **of: int) -> Tensor:
        index = ids.new_empty(*ids.shape, len(primes) * len(sizes))
        floor.add("hashes", size(ids) + size(index))
        return index

    def rotate_two(qkv: Tensor, *angles: Tensor) -> tuple[Tensor, ...]:
        make = lambda x, *_: tuple(torch.empty_like(part) for part in x.unbind(2)[:2])  # noqa: E731
        return (*one("rotation", make, qkv, *angles), qkv.unbind(2)[2])

    return SimpleNamespace(
        rms_norm=lambda x, weight, eps, kind: one("norm", lambda x, _: torch.empty_like(x, dtype=kind), x, weight),
        swiglu=lambda x: one("gate", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2), x),
        rotate=lambda x, *angles: one("rotation", lambda x, *_: torch.empty_like(x), x, *angles),
        rotate_two=rotate_two,
        run_maxima=lambda x, segment, count: one("maxima", lambda x, _: x.new_empty(count, x.shape[1]), x, segment),
        cross=lambda query, *rest: one("cross-attention", lambda query, *_: torch.empty_like(query), query, *rest),
        hashes=hashes,
        sum_rows=lambda table, index: table.new_empty(len(index), table.shape[1]),
    )


def attend(floor: Floor, query: Tensor, keys: Tensor, values: Tensor, these: Any) -> Tensor:
    """Attention by runs: FLOPs of visible pairs only."""
    operations = 4.0 * these.pairs * query.shape[1] * query.shape[2]
    return Pass.apply(floor, "attention", lambda query, *_: torch.empty_like(query), operations, query, keys, values)


def counted(of: Callable[..., Any], queries: Tensor, keys: Tensor, window: int | None, device: Any) -> Any:
    """Runs with their number of pairs: of n queries and m keys, the last query sees m, the one before one less."""
    found = of(queries, keys, window, device)
    n, m = queries.diff().double(), keys.diff().double()
    seen = n * m - n * (n - 1) / 2
    if window is not None:
        beyond = (m - window).clamp(min=0).minimum(n)  # queries that do not see the first key of their run
        seen = seen - beyond * (m - window).clamp(min=0) + beyond * (beyond - 1) / 2
    object.__setattr__(found, "pairs", float(seen.clamp(min=0).sum()))
    return found


@contextlib.contextmanager
def fused_passes(floor: Floor) -> Generator[None]:
    """Give models on the meta device the kernels of a GPU."""
    kernels, of = kernels_of(floor), runs.Runs.of
    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (fused, "kernels", lambda x: kernels if x.device.type == "meta" else None),
            (fused, "rounds", lambda x: True),
            (runs, "present", lambda device: device == "meta"),
            (runs, "attends", lambda x, head_dim: x.device.type == "meta" and head_dim % 8 == 0),
            (runs, "kernel", partial(attend, floor)),
            (runs.Runs, "of", partial(counted, of)),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield
