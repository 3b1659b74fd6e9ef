"""A simulated device: its tensors hold host values; device mismatches, synchronizations and launches are detected.

    with pretend() as seen:
        far = moved(model)          a copy whose weights are on the pretend device, "meta" to whoever asks
        logits, _ = far(ids)        ids on the host
        to_host(logits)             the numbers

Raises PlacementError where tensors of both places meet, and where a size or a branch is decided from numbers on the
device, which would wait for it. Fetching with `to_host` is allowed, and counted: it is one wait. What it cannot show is
speed, waits inside kernels, and how a GPU rounds.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ASKS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
COPIES = {"_to_copy", "to"}  # the second where no gradients are kept
MAKES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}  # without a kernel
HERE, AWAY = torch.device("cpu"), torch.device("meta")

M = TypeVar("M", bound=nn.Module)


class PlacementError(AssertionError):
    """An operation that a device would refuse, or would be waited for."""


@dataclass
class Seen:
    """What was done on the pretend device."""

    launches: Counter[str] = field(default_factory=Counter)
    """Operators that would launch a kernel at the least, by name; views do not."""
    uploads: int = 0
    """Copies from the host."""
    fetches: Counter[str] = field(default_factory=Counter)
    """Copies to the host, each of them a synchronization, by file and line of the caller."""


class Far(Tensor):
    """A tensor of the pretend device around one of the host."""

    here: Tensor

    @staticmethod
    def __new__(cls: type[Far], here: Tensor) -> Far:
        """Around a tensor of the host."""
        like: Any = {"strides": here.stride(), "storage_offset": here.storage_offset(), "device": AWAY}
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        far = make(cls, here.shape, dtype=here.dtype, **like)
        far.here = here
        return far

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Far({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Outside of `pretend`, as backward passes may be, the same without counting."""
        return Pretend(Seen()).__torch_dispatch__(func, types, args, kwargs)


class Pretend(TorchDispatchMode):
    """Runs operators on the numbers of the host, and holds them to the rules of two places."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = any(isinstance(x, Far) for x in tensors)
        to = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)), None)
        if far and name in COPIES and to == HERE:
            self.seen.fetches[place()] += 1
            return func(*tree_map(near, args), **tree_map(near, kwargs))
        if far:
            self.check(name, args, tensors)
        self.seen.uploads += name in COPIES and to == AWAY and not far
        out = func(*tree_map(near, args), **tree_map(near, kwargs))
        if not far and to != AWAY:
            return out
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and name not in MAKES:
            self.seen.launches[name] += 1
        if func._schema.is_mutable and isinstance(args[0], Far) and isinstance(out, Tensor):
            return args[0]
        return tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, out)

    @staticmethod
    def check(name: str, args: Any, tensors: list[Tensor]) -> None:
        """Raises PlacementError for what would break on a device, or wait for it."""
        mixed = [x for x in tensors if not isinstance(x, Far) and x.ndim]
        if mixed and name not in (*COPIES, "copy_"):
            shapes = [tuple(x.shape) for x in mixed]
            raise PlacementError(f"{place()}: {name} of a tensor on the device with {shapes} of the host")
        if name in ASKS:
            raise PlacementError(f"{place()}: {name} waits for the device: decide it on the host, or fetch once")
        by = args[1] if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple) else ()
        if any(isinstance(i, Far) and i.dtype == torch.bool for i in by):
            raise PlacementError(f"{place()}: {name} by a mask waits for the device: use torch.where, or indices")


def near(x: Any) -> Any:
    """The host tensor behind a tensor of the simulated device, or the host for the device; anything else unchanged."""
    if isinstance(x, Far):
        return x.here
    return HERE if isinstance(x, torch.device) and x == AWAY else x


def place() -> str:
    """The innermost file and line of the package, or of its user, being executed."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and __file__ != f.filename]
    ours = [f for f in frames if "/bytelm/" in f.filename and "/testing/" not in f.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rpartition('/src/')[2]}:{frame.lineno}"


@contextlib.contextmanager
def pretend() -> Generator[Seen]:
    """The pretend device, as long as the block lasts."""
    seen = Seen()
    autocast = torch.autocast

    def known(device: str, *args: Any, **kwargs: Any) -> Any:  # autocast does not know the device that stands in
        return contextlib.nullcontext() if device == AWAY.type else autocast(device, *args, **kwargs)

    with mock.patch.object(torch, "autocast", known), Pretend(seen):
        yield seen


def moved(model: M) -> M:
    """A copy of a model whose weights are on the pretend device, patcher and entropy model included."""
    found = copy.deepcopy(model)
    found._apply(lambda x: x if isinstance(x, Far) else cast("Tensor", Far(x.detach())))
    return found
