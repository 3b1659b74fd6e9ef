"""Models for inference in little memory: linear layers packed as the kernels read them, tables left in their file.

    file ─ one tensor at a time, checked ─┬─ linear layers   bf16 or int8, in panels   `nn.packed`
                                          ├─ n-gram tables   as stored, or left there  `nn.tables`
                                          └─ the others      float32                   norms, embeddings of bytes

The patcher's layers keep the precision of the file: they are computed in float32 all the same, and boundaries do not
depend on `weights`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bytelm.checkpoint import store
from bytelm.checkpoint.parts import StoredTensor
from bytelm.checkpoint.stored import stored_tensors
from bytelm.checkpoint.tensors import NARROW, SCALE, WEIGHT, restored, scale_of, widened
from bytelm.errors import ResourceError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.machine import memory
from bytelm.native import packing
from bytelm.native.library import reason
from bytelm.nn.packed import PackedLinear
from bytelm.nn.products import Linear
from bytelm.nn.tables import RowsInFile, StoredTable
from bytelm.units import show_bytes

Weights = Literal["bf16", "int8"]
Tables = Literal["mapped", "memory"]

Watch = Callable[[str, int], Callable[[int], None] | None]
"""Of what is done and its bytes, a callback for progress, if it is to be shown."""

WEIGHTS: tuple[Weights, ...] = get_args(Weights)
TABLES: tuple[Tables, ...] = get_args(Tables)
KINDS: dict[torch.dtype, Weights] = {torch.bfloat16: "bf16", torch.int8: "int8"}
SIZES = {"bf16": 2, "int8": 1, None: 4}
PATCHER = "patcher."  # what names of a patcher and its entropy model begin with
WORKING = 512 << 20  # bytes, at most those of the file, for caches, activations and what is being packed
STREAMED = 1 << 26  # parameters that exceed the caches of any processor
LINE = 64  # bytes, at multiples of which matrices begin


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a file go. Keys are the names of modules, without ".weight"."""

    linear: Mapping[str, Linear]
    tables: Mapping[str, nn.Module]
    others: list[str]
    """Names of tensors."""
    weights: dict[str, StoredTensor]
    """Of linear layers and tables."""
    scales: dict[str, StoredTensor]
    """Of weights that are stored in int8."""

    @classmethod
    def of(cls, model: ByteModel, stored: dict[str, StoredTensor]) -> Plan:
        """The plan of a model on the meta device."""
        looked_up = {id(table.weight) for table in model.lookup_tables()}
        modules = dict(model.named_modules())
        linear = {name: module for name, module in modules.items() if isinstance(module, Linear)}
        tables = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Embedding) and id(module.weight) in looked_up
        }
        weights = {name: stored[f"{name}.weight"] for name in (*linear, *tables)}
        others = [name for name in model.state_dict() if name.removesuffix(".weight") not in weights]
        scales = {name: stored[f"{name}{SCALE}"] for name in weights if f"{name}{SCALE}" in stored}
        return cls(linear, tables, others, weights, scales)

    def packed(self, tables: Tables | None) -> list[str]:
        """The modules whose weights are read when a model is loaded."""
        return [*self.linear, *([] if tables == "mapped" else self.tables)]

    def kind(self, name: str, weights: Weights | None) -> Weights | None:
        """In what a linear layer is packed; None is float32."""
        own = KINDS.get(self.weights[name].like.dtype)
        return own if weights is None or name.startswith(PATCHER) else weights

    def needed(self, stored: dict[str, StoredTensor], weights: Weights | None, tables: Tables | None) -> int:
        """Bytes of memory with these options."""
        found = min(WORKING, sum(tensor.like.nbytes for tensor in stored.values()))
        found += sum(4 * stored[name].like.numel() for name in self.others)
        found += sum(self.weights[name].like.numel() * SIZES[self.kind(name, weights)] for name in self.linear)
        held = [self.weights[name].like for name in self.tables if tables != "mapped"]
        return found + sum(like.nbytes * (2 if like.dtype == torch.float16 else 1) for like in held)

    def check_memory(self, stored: dict[str, StoredTensor], wanted: int, where: Path) -> None:
        """Raises ResourceError if there is less memory than `wanted`, and names the options that make it fit."""
        free = memory().free
        if not free or wanted <= free:  # some systems do not tell
            return
        says = f"{where} needs {show_bytes(wanted)} of memory, and {show_bytes(free)} are free"
        for kind in WEIGHTS:
            if (least := self.needed(stored, kind, "mapped")) <= free:
                raise ResourceError(f"{says}: load it with {options(kind)} ({show_bytes(least)})")
        least = show_bytes(self.needed(stored, "int8", "mapped"))
        raise ResourceError(f"{says}: {options('int8')} need the least, {least}: close other programs")


def options(kind: Weights) -> str:
    """What to load a model with, in Python and on the command line."""
    return f'weights="{kind}", tables="mapped", or --weights {kind} --tables mapped'


def load_packed(
    model: ByteModel, checkpoint: Path, weights: Weights | None, tables: Tables | None, watch: Watch | None = None
) -> ByteModel:
    """Load the weights of a model on the meta device, for inference on the host.

    `weights` None: linear layers in the precision of the file. `tables` None is "memory". `watch` makes a callback for
    progress, see `cli.common.counter`.
    Raises CheckpointError, UsageError without kernels, and ResourceError where there is too little memory.
    """
    if why := reason("kernels"):
        raise UsageError(
            f"packed weights are read by the kernels, and there are none: {why}; leave out weights and tables"
        )
    stored = stored_tensors(checkpoint)
    compare(model, stored, checkpoint)
    plan = Plan.of(model, stored)
    if not plan.linear:
        raise UsageError(f"the kernels do not know the layers of {type(model).__name__}: leave out weights and tables")
    plan.check_memory(stored, plan.needed(stored, weights, tables), checkpoint)
    sizes = {name: plan.weights[name].like.nbytes for name in plan.packed(tables)}
    progress = watch("loading", sum(sizes.values())) if watch else None
    for name, module in modules(plan, weights, tables):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
        if progress:
            progress(sizes.get(name, 0))
    rest = {name: whole(name, stored) for name in plan.others}
    store.check_keys(rest, rest, checkpoint)  # that they are finite
    model.load_state_dict(rest, strict=False, assign=True)
    kinds: set[Weights | None] = {plan.kind(name, weights) for name in plan.linear if not name.startswith(PATCHER)}
    model.quantization = kinds.pop() if len(kinds) == 1 else None
    model.content = partial(content, stored, model.quantization)
    return model.requires_grad_(False)


def check_memory(model: ByteModel, checkpoint: Path, dtype: torch.dtype | None) -> None:
    """Raises ResourceError if there is too little memory for all of a model, and names the options that make it fit."""
    stored = stored_tensors(checkpoint, checked=False)
    compare(model, stored, checkpoint)
    size = 4 if dtype is None else dtype.itemsize
    wanted = sum(like.numel() * size for like in model.state_dict().values())
    wanted += max((tensor.like.nbytes for tensor in stored.values()), default=0)  # the one that is being converted
    Plan.of(model, stored).check_memory(stored, wanted, checkpoint)


def load_patcher(model: ByteModel, checkpoint: Path) -> None:
    """Load what decides how a model on the meta device cuts documents, and nothing else. Raises CheckpointError."""
    stored, buffers = stored_tensors(checkpoint), dict(model.named_buffers())
    compare(model, stored, checkpoint)
    names = [name for name in model.state_dict() if name.startswith(PATCHER) or name in buffers]
    model.load_state_dict({name: whole(name, stored) for name in names}, strict=False, assign=True)


def whole(name: str, stored: Mapping[str, StoredTensor]) -> Tensor:
    """A tensor as the model holds it: in float32, unless it is of whole numbers."""
    tensor, scale = stored[name].read(), stored.get(scale_of(name))
    return restored(tensor, scale.read()) if scale and tensor.dtype == torch.int8 else widened(name, tensor)


def scale_in(plan: Plan, name: str) -> Tensor | None:
    """The scales of a weight in int8; None for another. Raises CheckpointError if they are not finite."""
    if (stored := plan.scales.get(name)) is None:
        return None
    return check_finite(f"{name}{SCALE}", stored.read(), stored.path)


def check_finite(name: str, tensor: Tensor, path: Path) -> Tensor:
    """The tensor. Raises CheckpointError if some of it is not finite."""
    store.check_keys({name: tensor}, {name: tensor}, path)
    return tensor


def modules(plan: Plan, weights: Weights | None, tables: Tables | None) -> Iterator[tuple[str, nn.Module]]:
    """What takes the places of linear layers and tables, by name."""
    kinds: dict[str, Weights | None] = {name: plan.kind(name, weights) for name in plan.linear}
    rooms = shared_memory(plan, kinds)
    large = sum(module.weight.numel() for module in plan.linear.values()) > STREAMED
    for name, tensor, scale in read(plan, tables):
        stored = plan.weights[name]
        if (module := plan.linear.get(name)) is None:
            if not stored.has_checksums:  # what bytelm saved is finite
                check_finite(f"{name}{WEIGHT}", tensor, stored.path)
            yield name, StoredTable(stored.like, packing.table(tensor, scale))
            continue
        matrix = packing.packed(tensor, kinds[name], scale=scale, halves=module.halves, streamed=large, out=rooms[name])
        if matrix.bad:
            check_finite(f"{name}{WEIGHT}", tensor, stored.path)
        yield name, PackedLinear(module.in_features, module.out_features, matrix, halves=module.halves)
    for name in plan.tables if tables == "mapped" else ():
        stored = plan.weights[name]
        rows = RowsInFile(*stored.opened_for_rows(), stored.like, scale_in(plan, name))
        yield name, StoredTable(stored.like, rows)


def shared_memory(plan: Plan, kinds: dict[str, Weights | None]) -> dict[str, Tensor]:
    """Room for each packed layer in one block of memory: without gaps, and in large pages where the system has them."""
    sizes: dict[str, int] = {}
    for name, module in plan.linear.items():
        kind = next((dtype for dtype, own in KINDS.items() if own == kinds[name]), torch.float32)
        sizes[name] = packing.packed_bytes(module.weight.shape, kind, halves=module.halves)
    block = np.empty(sum(size + LINE for size in sizes.values()) + LINE, np.uint8)
    at = -block.ctypes.data % LINE
    found: dict[str, Tensor] = {}
    for name, size in sizes.items():
        found[name] = torch.from_numpy(block[at : at + size])
        at += size + -size % LINE
    return found


def read(plan: Plan, tables: Tables | None) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, weight and scale of each module in the order of the file, the next one read while one is packed.

    The weight of a linear layer is overwritten when the one after the next is asked for.
    """
    names = sorted(plan.packed(tables), key=lambda name: (plan.weights[name].path, plan.weights[name].start))
    largest = max((plan.weights[name].like.nbytes for name in plan.linear), default=0)
    rooms = cycle([torch.empty(largest, dtype=torch.uint8) for _ in range(2)])

    def one(name: str) -> tuple[str, Tensor, Tensor | None]:
        tensor = plan.weights[name].read(next(rooms) if name in plan.linear else None)
        return name, tensor.float() if tensor.dtype == torch.float16 else tensor, scale_in(plan, name)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(one, names[0]) if names else None
        for following in [*names[1:], None]:
            assert ahead is not None
            found = ahead.result()
            ahead = pool.submit(one, following) if following else None
            yield found


def content(stored: dict[str, StoredTensor], weights: Weights | None) -> bytes:
    """A hash of all weights, and of how they are rounded."""
    sums = {name: tensor.digest() for name, tensor in stored.items()}
    return hashlib.sha256(repr((sorted(sums.items()), weights)).encode()).digest()


def compare(model: ByteModel, stored: dict[str, StoredTensor], checkpoint: Path) -> None:
    """Check names, shapes and kinds of dtype. Raises CheckpointError with a table."""
    likes = {name: tensor.like for name, tensor in stored.items()}
    wanted: dict[str, Tensor] = dict(model.state_dict())
    for name, like in wanted.copy().items():
        found, scale = likes.get(name), scale_of(name)
        if found is None or not like.is_floating_point():
            continue
        if found.dtype == torch.int8 and scale in likes and like.ndim == 2 and name.endswith(WEIGHT):
            wanted[scale] = torch.empty(like.shape[:1], device="meta")
        if found.dtype in NARROW or scale in wanted:
            wanted[name] = torch.empty(like.shape, dtype=found.dtype, device="meta")
    store.check_keys(wanted, likes, checkpoint)
