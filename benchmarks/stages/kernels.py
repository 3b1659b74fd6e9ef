"""What stands between matrix products: error against float64, and gigabytes a second there and back.

Each pass is what the modules of `bytelm.nn` compute under bfloat16 autocast on this device, by whichever kernel they
choose; the truth is the same module in float64. Errors are taken on odd shapes, results being written where NaNs lay
before. gb_per_s: inputs, results and their slopes, read or written once each, whatever is done really; share: of the
speed of a copy. Attention, which is bound by products, has tflop_per_s instead: 4 operations a pair of positions and
channel there, 2.5 times as many back, masked pairs not among them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bytelm.nn.attention import View, Where
from bytelm.nn.cross import BytesFromPatches, PatchesFromBytes
from bytelm.nn.norm import RMSNorm
from bytelm.nn.pool import run_maxima
from bytelm.nn.rope import rotate, rotation
from bytelm.nn.transformer import swiglu
from stages.bench import Bench, Found, Measurement, apart, profiled, rates, seconds

SECONDS, EACH = 120, 40
COLUMNS = ("error", "there_us", "both_us", "gb_per_s", "share", "tflop_per_s", "launches")
CLOSE = 2e-2  # of bfloat16 results and slopes, as parts of their size
POISON = 1 << 28  # numbers


@dataclass(frozen=True)
class Pass:
    """A function of floating-point inputs, and of weights, which are moved with it."""

    run: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    operations: float = 0.0
    """Of the way there; 0 where memory is the limit."""


def poison(bench: Bench) -> None:
    """Have the memory that a GPU takes next hold NaNs: torch keeps what is freed."""
    torch.full((bench.size(POISON, 1 << 10),), float("nan"), device=bench.device)


def both(run: Callable[..., Tensor], inputs: Sequence[Tensor], slope: Tensor | None) -> list[Tensor]:
    """What comes out, its slope, by default random numbers of 16 bits, and the slopes of all inputs and weights."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    weights = list(run.parameters()) if isinstance(run, nn.Module) else []
    found = run(*inputs)
    slope = torch.randn_like(found).bfloat16() if slope is None else slope
    slope = slope.to(found.dtype)
    return [found.detach(), slope, *torch.autograd.grad(found, [*inputs, *weights], slope)]


def error(bench: Bench, make: Callable[..., Pass], **shape: Any) -> float:
    """The largest distance from float64, of the results and of the slopes of each input."""
    torch.manual_seed(0)
    one = make(bench, **shape)
    exact = copy.deepcopy(one.run).double() if isinstance(one.run, nn.Module) else one.run
    wanted = both(exact, [x.double() for x in one.inputs], None)
    poison(bench)
    with torch.autocast(bench.device.type, torch.bfloat16):
        found = both(one.run, one.inputs, wanted[1])
    return max(apart(a, b) for a, b in zip(found, wanted, strict=True))


def measured(bench: Bench, make: Callable[..., Pass], small: dict[str, Any], large: dict[str, Any]) -> Found:
    found: Found = {"error": error(bench, make, **small)}
    one = make(bench, **bench.size(large, small))
    copy_rate, _ = rates(bench)
    with torch.autocast(bench.device.type, torch.bfloat16):
        moved = sum(x.nbytes for x in (*one.inputs, *one.inputs, *both(one.run, one.inputs, None)))
        with torch.no_grad():
            there = seconds(bench, lambda: one.run(*one.inputs))
        took = seconds(bench, lambda: both(one.run, one.inputs, None))
        found |= profiled(bench, lambda: both(one.run, one.inputs, None))
    found |= {"there_us": 1e6 * there, "both_us": 1e6 * took}
    if one.operations:
        found["tflop_per_s"] = 3.5 * one.operations / took / 1e12
    else:
        found |= {"gb_per_s": moved / took / 1e9, "share": moved / took / copy_rate}
    return {"failed": f"off by {found['error']:.3g}, bound {CLOSE}", **found} if found["error"] > CLOSE else found


def normal(bench: Bench, *shape: int, half: bool = True) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16 if half else torch.float32)


def norm(bench: Bench, rows: int, dim: int) -> Pass:
    """Of the residual line, which is in float32."""
    return Pass(RMSNorm(dim).to(bench.device), [normal(bench, rows, dim, half=False)])


def gate(bench: Bench, rows: int, hidden: int) -> Pass:
    return Pass(swiglu, [normal(bench, rows, 2 * hidden)])


def turn(bench: Bench, rows: int, new: int, heads: int, dim: int) -> Pass:
    positions = torch.arange(new, device=bench.device).expand(rows, -1)
    return Pass(partial(rotate, by=rotation(positions, dim, 1e4)), [normal(bench, rows, new, heads, dim)])


def maximum(bench: Bench, slots: int, patch: int, dim: int) -> Pass:
    """Of runs of `patch` slots."""
    segment = torch.arange(slots, device=bench.device) // patch
    count = -(-slots // patch)
    return Pass(lambda x: run_maxima(x, segment, count), [normal(bench, slots, dim)])


def attention(bench: Bench, rows: int, new: int, heads: int, dim: int, window: int | None, documents: int) -> Pass:
    """Rows of so many documents each, of equal lengths."""
    starts = (torch.arange(new) % -(-new // documents) == 0).expand(rows, -1)
    lengths = torch.full((rows,), new)
    view = View.of(lengths, starts, Where.zero(rows), 0, window, dim, 1e4, bench.device)
    mean, width = new / documents, min(new // documents, window or new)
    pairs = rows * new * width * (1 - width / (2 * mean))
    inputs = [normal(bench, rows, new, heads, dim) for _ in range(3)]
    return Pass(lambda q, k, v: view.attend(q, k, v, None)[0], inputs, 4 * pairs * heads * dim)


def gathering(bench: Bench, slots: int, patch: int, dim: int, heads: int, k: int) -> Pass:
    """The whole module, products among it: bytes and patches in, patches out."""
    segment = torch.arange(slots, device=bench.device) // patch
    count = -(-slots // patch)
    module = PatchesFromBytes(dim, heads).to(bench.device)
    return Pass(Closed(module, segment), [normal(bench, count, k, dim), normal(bench, slots, dim)])


def spreading(bench: Bench, rows: int, new: int, patch: int, dim: int, heads: int, k: int) -> Pass:
    index = (torch.arange(new, device=bench.device) // patch).expand(rows, -1)
    count = -(-new // patch)
    module = BytesFromPatches(dim, heads).to(bench.device)
    return Pass(Closed(module, index), [normal(bench, rows, new, dim), normal(bench, rows, count, k, dim)])


class Closed(nn.Module):
    """A module with its last argument."""

    def __init__(self, module: nn.Module, last: Tensor) -> None:
        super().__init__()
        self.module, self.last = module, last

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs, self.last)


PASSES: dict[str, tuple[Callable[..., Pass], dict[str, Any], dict[str, Any]]] = {
    "norm": (norm, {"rows": 1037, "dim": 512}, {"rows": 131072, "dim": 512}),
    "norm, wide": (norm, {"rows": 133, "dim": 2048}, {"rows": 32768, "dim": 2048}),
    "gate": (gate, {"rows": 1037, "hidden": 1408}, {"rows": 131072, "hidden": 1408}),
    "rotation": (
        turn,
        {"rows": 3, "new": 133, "heads": 8, "dim": 64},
        {"rows": 16, "new": 8192, "heads": 8, "dim": 64},
    ),
    "segment maximum": (
        maximum,
        {"slots": 1037, "patch": 5, "dim": 512},
        {"slots": 131072, "patch": 5, "dim": 512},
    ),
    "attention, full": (
        attention,
        {"rows": 2, "new": 333, "heads": 4, "dim": 64, "window": None, "documents": 1},
        {"rows": 4, "new": 8192, "heads": 16, "dim": 64, "window": None, "documents": 1},
    ),
    "attention, documents": (
        attention,
        {"rows": 2, "new": 333, "heads": 4, "dim": 64, "window": None, "documents": 3},
        {"rows": 4, "new": 8192, "heads": 16, "dim": 64, "window": None, "documents": 4},
    ),
    "attention, window": (
        attention,
        {"rows": 2, "new": 333, "heads": 4, "dim": 64, "window": 100, "documents": 2},
        {"rows": 16, "new": 8192, "heads": 8, "dim": 64, "window": 512, "documents": 4},
    ),
    "patches from bytes": (
        gathering,
        {"slots": 1037, "patch": 5, "dim": 512, "heads": 8, "k": 2},
        {"slots": 131072, "patch": 5, "dim": 512, "heads": 8, "k": 2},
    ),
    "bytes from patches": (
        spreading,
        {"rows": 2, "new": 333, "patch": 5, "dim": 512, "heads": 8, "k": 2},
        {"rows": 16, "new": 8192, "patch": 5, "dim": 512, "heads": 8, "k": 2},
    ),
}


def measurements(bench: Bench) -> Iterator[Measurement]:
    for name, (make, small, large) in PASSES.items():
        yield name, partial(measured, bench, make, small, large)
