"""Operations between matmuls: error against float64, and GB/s forward and backward.

Each is a module of `bytelm.nn` under bfloat16 autocast on this device, with whichever kernel it chooses; the reference
is the same module in float64. Errors are on odd shapes, with results in memory that contained NaN. times: speed-up over
plain torch, without our kernels and attention by runs. gb_per_s: inputs, results and their gradients, each counted
once; share: of copy bandwidth. Attention, which is compute-bound, has tflop_per_s instead: 4 FLOPs per pair of
positions and channel forward, 2.5 times as many backward, without masked pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bytelm.models.blt.cross import BytesFromPatches, PatchesFromBytes
from bytelm.models.blt.pool import run_maxima
from bytelm.models.megabyte.grid import Grid, PatchView
from bytelm.nn.attention import CausalPattern, RowPositions
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.nn.norm import RMSNorm
from bytelm.nn.rope import rotate_two, rotation
from bytelm.nn.rows import RowGradients
from bytelm.nn.transformer import swiglu
from stages.bench import Bench, Found, Measurement, apart, plain_torch, profiled, rates, seconds

SECONDS, EACH = 70, 40
COLUMNS = ("error", "there_us", "both_us", "times", "gb_per_s", "share", "tflop_per_s", "launches")
CLOSE = 2e-2  # of bfloat16 results and slopes, as parts of their size
POISON = 1 << 28  # numbers
Run = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Pass:
    """A function of floating-point inputs, and of weights, which are moved with it."""

    run: Run
    inputs: Sequence[Tensor]
    operations: float = 0.0
    """Of the way there; 0 where memory is the limit."""


def poison(bench: Bench) -> None:
    """Have the memory that a GPU takes next hold NaNs: torch keeps what is freed."""
    torch.full((bench.size(POISON, 1 << 10),), float("nan"), device=bench.device)


def both(run: Run, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> tuple[list[Tensor], ...]:
    """What comes out, its slopes, by default random numbers of 16 bits, and the slopes of all inputs and weights."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    weights = list(run.parameters()) if isinstance(run, nn.Module) else []
    found = run(*inputs)
    found = [found] if isinstance(found, Tensor) else list(found)
    gradients = [torch.randn_like(x).bfloat16() for x in found] if gradients is None else gradients
    gradients = [gradient.to(x.dtype) for gradient, x in zip(gradients, found, strict=True)]
    back = torch.autograd.grad(found, [*inputs, *weights], gradients)
    return [x.detach() for x in found], gradients, list(back)


def error(bench: Bench, make: Callable[..., Pass], **shape: Any) -> float:
    """The largest distance from float64, of the results and of the slopes of each input."""
    torch.manual_seed(0)
    one = make(bench, **shape)
    exact = copy.deepcopy(one.run).double() if isinstance(one.run, nn.Module) else one.run
    wanted, gradients, back = both(exact, [x.double() for x in one.inputs])
    poison(bench)
    with torch.autocast(bench.device.type, torch.bfloat16):
        found, _, own = both(one.run, one.inputs, gradients)
    return max(apart(a, b) for a, b in zip([*found, *own], [*wanted, *back], strict=True))


def measured(bench: Bench, make: Callable[..., Pass], small: dict[str, Any], large: dict[str, Any]) -> Found:
    found: Found = {"error": error(bench, make, **small)}
    one = make(bench, **bench.size(large, small))
    with torch.autocast(bench.device.type, torch.bfloat16):
        results, gradients, back = both(one.run, one.inputs)
        moved = sum(x.nbytes for x in (*one.inputs, *one.inputs, *results, *gradients, *back))
        del results, back
        with torch.no_grad():
            there = seconds(bench, lambda: one.run(*one.inputs))
        took = seconds(bench, lambda: both(one.run, one.inputs, gradients))
        found |= profiled(bench, lambda: both(one.run, one.inputs, gradients))
        with plain_torch():
            plain = seconds(bench, lambda: both(one.run, one.inputs, gradients))
    found |= {"there_us": 1e6 * there, "both_us": 1e6 * took, "plain_us": 1e6 * plain, "times": plain / took}
    if one.operations:
        found["tflop_per_s"] = 3.5 * one.operations / took / 1e12
    else:
        found |= {"gb_per_s": moved / took / 1e9, "share": moved / took / rates(bench)[0]}
    return judged(found)


def judged(found: Found) -> Found:
    return {"failed": f"off by {found['error']:.3g}, bound {CLOSE}", **found} if found["error"] > CLOSE else found


def normal(bench: Bench, *shape: int, half: bool = True) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16 if half else torch.float32)


def norm(bench: Bench, rows: int, dim: int) -> Pass:
    """Of the residual line, which is in float32."""
    return Pass(RMSNorm(dim).to(bench.device), [normal(bench, rows, dim, half=False)])


def gate(bench: Bench, rows: int, hidden: int) -> Pass:
    return Pass(swiglu, [normal(bench, rows, 2 * hidden)])


def turn(bench: Bench, rows: int, new: int, heads: int, dim: int) -> Pass:
    """Queries and keys, of queries, keys and values in one."""
    positions = torch.arange(new, device=bench.device).expand(rows, -1)
    return Pass(partial(rotate_two, by=rotation(positions, dim, 1e4)), [normal(bench, rows, new, 3, heads, dim)])


def maximum(bench: Bench, slots: int, patch: int, dim: int) -> Pass:
    """Of runs of `patch` slots; the last slots are of none."""
    count = slots // patch
    segment = (torch.arange(slots, device=bench.device) // patch).clamp(max=count)
    return Pass(lambda x: run_maxima(x, segment, count), [normal(bench, slots, dim)])


def attention(bench: Bench, rows: int, new: int, heads: int, dim: int, window: int | None, documents: int) -> Pass:
    """Rows of so many documents each, of equal lengths."""
    starts = (torch.arange(new) % -(-new // documents) == 0).expand(rows, -1)
    lengths = torch.full((rows,), new)
    view = CausalPattern.of(lengths, starts, RowPositions.zero(rows), 0, window, dim, 1e4, bench.device)
    mean, width = new / documents, min(new // documents, window or new)
    pairs = rows * new * width * (1 - width / (2 * mean))
    inputs = [normal(bench, rows, new, heads, dim) for _ in range(3)]
    return Pass(lambda q, k, v: view.attend(q, k, v, None)[0], inputs, 4 * pairs * heads * dim)


def places(bench: Bench, lines: int, size: int, heads: int, dim: int) -> Pass:
    """The places of so many patches, each patch by itself."""
    place = torch.arange(lines * size)[None] % size
    grid = Grid.of(place, place < 0, torch.tensor([lines * size]), size).carried(bench.device)
    view = PatchView.of(grid, 0, False, dim, 1e4)
    inputs = [normal(bench, lines, size, heads, dim) for _ in range(3)]
    return Pass(lambda q, k, v: view.attend(q, k, v, None)[0], inputs)


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
    "run maxima": (
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
    "attention, places of patches": (
        places,
        {"lines": 133, "size": 8, "heads": 3, "dim": 64},
        {"lines": 16384, "size": 8, "heads": 8, "dim": 64},
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


DIM, SIZES = 512, (3, 4, 5, 6, 7, 8)  # of n-gram tables


def lookups(bench: Bench) -> Found:
    """The n-grams of all bytes hashed, and their rows summed, beside the CPU's; what is read is counted."""
    rows, new, table = bench.size((16, 8192, 500_002), (2, 300, 101))
    module = NgramEmbedding(DIM, SIZES, 1, table)
    there = copy.deepcopy(module).to(bench.device)
    ids = torch.randint(0, 256, (rows, new), generator=torch.Generator().manual_seed(0))
    given = ids, torch.rand(rows, new, generator=torch.Generator().manual_seed(1)) < 0.01, module.initial_state(rows)
    own = [x.to(bench.device) for x in given]
    with torch.no_grad():
        poison(bench)
        gap = apart(there(*own)[:2], module(*(x[:2] for x in given)))
        took = seconds(bench, lambda: there(*own))
        with plain_torch():
            plain = seconds(bench, lambda: there(*own))
        seen = profiled(bench, lambda: there(*own))
    moved = 4 * ids.numel() * DIM * (len(SIZES) + 1)
    return judged(
        {"error": gap, "there_us": 1e6 * took, "plain_us": 1e6 * plain, "times": plain / took, **seen}
        | {
            "gb_per_s": moved / took / 1e9,
            "share": moved / took / rates(bench)[0],
        }
    )


def moves(bench: Bench) -> Found:
    """Rows of tables moved by the slopes of the bags that read them, some often, beside plain torch in float64."""
    bags, count, dim = bench.size((131_072, 500_002, 512), (300, 101, 16))
    generator = torch.Generator().manual_seed(0)
    often = torch.rand(bags, 6, generator=generator) ** 3 * count
    index = (often.long() + count * torch.arange(6)).to(bench.device)
    gradients = torch.randn(bags, dim, generator=generator).to(bench.device)
    table, second = torch.zeros(6 * count, dim, device=bench.device), torch.zeros(6 * count, dim, device=bench.device)

    def move(table: Tensor, second: Tensor, index: Tensor, gradients: Tensor) -> Tensor:
        kept = RowGradients([index], [gradients])
        norm = kept.norm()
        kept.move(table, second, 1e-3, 0.95, 1e-8)
        return norm

    part = index[:2000], gradients[:2000]
    with plain_torch():
        one, two = (x.clone().double() for x in (table, second))
        truth = move(one, two, part[0], part[1].double())
    poison(bench)
    norm = move(table, second, *part)
    read = part[0].unique()
    gap = max(apart(norm, truth), apart(table[read], one[read]), apart(second[read], two[read]))
    del one, two
    took = seconds(bench, lambda: move(table, second, index, gradients))
    with plain_torch():
        plain = seconds(bench, lambda: move(table, second, index, gradients))
    moved = 4 * dim * (2 * 6 * bags + 4 * len(index.unique()))  # slopes twice; rows and their moments there and back
    seen = profiled(bench, lambda: move(table, second, index, gradients))
    return judged(
        {"error": gap, "both_us": 1e6 * took, "plain_us": 1e6 * plain, "times": plain / took, **seen}
        | {
            "gb_per_s": moved / took / 1e9,
            "share": moved / took / rates(bench)[0],
        }
    )


def measurements(bench: Bench) -> Iterator[Measurement]:
    for name, (make, small, large) in PASSES.items():
        yield name, partial(measured, bench, make, small, large)
    yield "n-grams looked up", partial(lookups, bench)
    yield "rows of tables moved", partial(moves, bench)
