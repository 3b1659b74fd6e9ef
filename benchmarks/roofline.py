"""Roofline time of a training step: each operator at the limit of bandwidth or matmul throughput; counted, not run.

    python benchmarks/roofline.py                         the shapes of `gpu.py steps`, at an H100's rates
    python benchmarks/roofline.py --copy 4.0e12 --product 7e14 --only demo

The model is on the meta device and plans on the host, so that each operator is seen with its shapes. Its time is the
longest of: its inputs and outputs at memory bandwidth (of tables only the rows read), its FLOPs at matmul throughput,
and LEAST. Linear layers and attention are in bfloat16, as under autocast. Each shape is counted in plain torch, and
with GPU kernels, one pass each (`passes.py`). The optimizer's 28 bytes per parameter, and 12 of clipping, are added;
sampling and synchronisation are not.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPY, PRODUCT, LEAST = 3.0e12, 6e14, 2.5e-6  # bytes/s, FLOP/s, seconds of the shortest kernel
MAKES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
VIEWS = {"_unsafe_view"}  # not marked in their schemas
LOOKUPS = {"embedding", "index", "index_select", "gather", "_embedding_bag"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


@dataclass
class Floor:
    """Sums over the operators of a step."""

    copy: float = COPY
    product: float = PRODUCT
    launches: int = 0
    bytes: float = 0.0
    operations: float = 0.0
    seconds: float = 0.0
    by: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by the operator's name."""

    @property
    def longest(self) -> list[tuple[str, float]]:
        return sorted(self.by.items(), key=lambda entry: -entry[1])

    def add(self, name: str, bytes: float, operations: float = 0.0, launches: int = 1) -> None:
        took = max(bytes / self.copy, operations / self.product, LEAST * launches)
        self.launches, self.bytes, self.operations = (
            self.launches + launches,
            self.bytes + bytes,
            self.operations + operations,
        )
        self.seconds += took
        self.by[name] += took


def size(x: Tensor) -> int:
    """Bytes in memory; expanded dimensions count once."""
    if x.is_sparse:
        return size(x._values())
    count = 1
    for extent, stride in zip(x.shape, x.stride(), strict=True):
        count *= extent if stride else 1
    return count * x.element_size()


class Counting(TorchDispatchMode):
    """Adds every operator on the meta device to a `Floor`; views are free."""

    def __init__(self, floor: Floor) -> None:
        super().__init__()
        self.floor = floor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or name in MAKES | VIEWS or not any(x.device.type == "meta" for x in results):
            return found
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and x.device.type == "meta"]
        made = sum(map(size, results))
        whole = [x for x in inputs if not (name in LOOKUPS and x.is_floating_point())]
        bytes = made + sum(map(size, whole)) + (made if name in LOOKUPS else 0)
        operations = 0.0
        if name in PRODUCTS:
            left, right = (x for x in args if isinstance(x, Tensor) and x.ndim > 1) if "add" not in name else args[1:3]
            operations = 2.0 * left.numel() * right.shape[-1]
        self.floor.add(name, bytes, operations)
        return found


class Attention(torch.autograd.Function):
    """Attention in one pass: shapes of results, and FLOPs of its pairs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, floor: Floor
    ) -> Tensor:
        pairs = query.shape[-2] * keys.shape[-2] * (0.5 if causal else 1.0)
        ctx.operations = 4.0 * query.shape[:-2].numel() * pairs * query.shape[-1]
        ctx.bytes = sum(map(size, (query, keys, values, query))) + (0 if mask is None else size(mask))
        ctx.floor = floor
        ctx.save_for_backward(query, keys, values)
        floor.add("attention", ctx.bytes, ctx.operations)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.floor.add("attention, back", 2 * ctx.bytes, 2.5 * ctx.operations, 2)
        return (*map(torch.empty_like, ctx.saved_tensors), None, None, None)


class Norm(torch.autograd.Function):
    """torch's RMSNorm on a GPU: one kernel forward, two backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, floor: Floor) -> Tensor:
        ctx.floor = floor
        ctx.save_for_backward(x, weight)
        floor.add("norm", 2 * size(x))
        return torch.empty_like(x, dtype=weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.floor.add("norm, back", 3 * size(ctx.saved_tensors[0]), launches=2)
        return (*map(torch.empty_like, ctx.saved_tensors), None)


class Autocast(TorchFunctionMode):
    """Linear layers and attention in bfloat16; weights are cast once per step."""

    def __init__(self, floor: Floor) -> None:
        super().__init__()
        self.floor, self.cast = floor, dict[int, tuple[Tensor, Tensor]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, *rest = args
            if id(weight) not in self.cast:
                self.cast[id(weight)] = weight, weight.to(torch.bfloat16)
            rest = [y if y is None else y.to(torch.bfloat16) for y in rest]
            return func(x.to(torch.bfloat16), self.cast[id(weight)][1], *rest, **kwargs)
        if func is F.rms_norm and args[0].device.type == "meta":
            return Norm.apply(args[0], kwargs.get("weight", args[2] if len(args) > 2 else None), self.floor)
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            query, keys, values = (x.to(torch.bfloat16) for x in args[:3])
            keys, values = (x.expand(*query.shape[:-2], *x.shape[-2:]) for x in (keys, values))
            mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
            return Attention.apply(query, keys, values, mask, causal, self.floor)
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting(copy: float = COPY, product: float = PRODUCT) -> Generator[Floor]:
    """A `Floor` that counts everything on the meta device in the block, forward and backward."""
    floor = Floor(copy, product)
    known = torch.autocast

    def autocast(device: str, *args: Any, **kwargs: Any) -> Any:  # does not know the meta device
        return contextlib.nullcontext() if device == "meta" else known(device, *args, **kwargs)

    with mock.patch.object(torch, "autocast", autocast), Counting(floor), Autocast(floor):
        yield floor


def floor_of(shape: Any, copy: float = COPY, product: float = PRODUCT, *, kernels: bool = False) -> Floor:
    """The `Floor` of a training step of a shape of `stages.steps`, in plain torch or with GPU kernels."""
    from passes import fused_passes
    from train import Windows

    from bytelm.interfaces.objective import score
    from bytelm.nn.ngrams import NgramEmbedding

    model = shape.recipe().build_on_meta().train()
    tables = [module for module in model.modules() if isinstance(module, NgramEmbedding) and module.ngram is not None]
    for module in tables:
        module.sparse = True
    batch = Windows(shape.window, hasattr(model, "patcher"), shape.rows).batch(0)
    opens = None if batch.boundaries is None else torch.from_numpy(batch.boundaries)
    with counting(copy, product) as floor, fused_passes(floor) if kernels else contextlib.nullcontext():
        nats, _ = score(model, torch.from_numpy(batch.ids), boundaries=opens)
        (nats / 100).backward()
    sparse = sum(module.ngram.weight.numel() for module in tables if module.ngram is not None)
    floor.add("optimizer", 40 * (sum(p.numel() for p in model.parameters() if p.requires_grad) - sparse))
    return floor


def main(arguments: Sequence[str] | None = None, shapes: dict[str, Any] | None = None) -> int:
    from stages.steps import SHAPES

    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copy", type=float, default=COPY, help="bytes per second (default: %(default)g)")
    parser.add_argument("--product", type=float, default=PRODUCT, help="FLOP/s (default: %(default)g)")
    parser.add_argument("--only", help="one shape")
    options = parser.parse_args(arguments)
    print(f"{'one step':<24}{'ms':>9}{'products':>10}{'GB':>8}{'TFLOP':>8}{'launches':>10}{'MB/s':>8}   longest, ms")
    for name, shape in (shapes or SHAPES).items():
        for kernels in (False, True) if options.only in (None, name) else ():
            floor = floor_of(shape, options.copy, options.product, kernels=kernels)
            longest = ", ".join(f"{op} {1e3 * took:.1f}" for op, took in floor.longest[:5])
            products = 1e3 * floor.operations / floor.product
            figures = f"{1e3 * floor.seconds:>9.1f}{products:>10.1f}{floor.bytes / 1e9:>8.1f}"
            speed = shape.rows * shape.window / floor.seconds / 1e6
            what = "  ... with kernels" if kernels else name
            print(f"{what:<24}{figures}{floor.operations / 1e12:>8.2f}{floor.launches:>10}{speed:>8.2f}   {longest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
