"""Functions of plans and activations on a device, recorded as CUDA graphs where there are such: one launch for many.

Graphs have fixed shapes: what is planned is filled up to powers of two, so that few shapes are met.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm.interfaces.decoder import Ints
from bytelm.transfer import to_device

GRAPHED = 256  # positions of a shape above which launches cost less than arithmetic, and no graph is kept


class Graphs:
    """Those of one function of a plan and of activations, which waits for nothing: a graph for each shape.

    The first call of a shape computes, and the second records: shapes that are met once are not worth a graph.
    What the function writes lies in memory that stays, and is the same however often it is written.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.met = set[Any]()
        self.found: dict[Any, Graph] = {}

    def __call__(
        self, function: Callable[..., Tensor], plan: Ints, *activations: Tensor, shape: tuple[int, ...] = ()
    ) -> Tensor:
        """What the function gives. `plan` [numbers, ...] is copied; `shape`: numbers of the host that decide one.

        The function is not kept: a method would keep its owner, and that the memory it writes to.
        """
        key = plan.shape, shape
        if self.recorder.records and plan[0].size <= GRAPHED:
            if key in self.met and key not in self.found:
                graph = self.recorder.tried(function, plan, activations, shape)
                if graph is not None:
                    self.found[key] = graph
            if key in self.found:
                return self.found[key].replay(plan, activations)
            self.met.add(key)
        return function(self.recorder.sent(plan), *activations, *shape)


@dataclass
class Graph:
    """A recorded function: what it reads stands where it stood."""

    graph: Any
    plan: Tensor
    activations: tuple[Tensor, ...]
    out: Tensor

    def replay(self, plan: Ints, activations: Sequence[Tensor]) -> Tensor:
        """What the function gives for these."""
        self.plan.copy_(torch.from_numpy(plan).pin_memory(), non_blocking=True)
        for mine, given in zip(self.activations, activations, strict=True):
            mine.copy_(given)
        self.graph.replay()
        # Graphs share their memory: another one that was recorded before this one may write over it.
        return self.out.clone()


class Recorder:
    """Where parts run, and the memory that their graphs share."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.records = device, device.type == "cuda"
        if self.records:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def sent(self, numbers: NDArray[Any]) -> Tensor:
        """Numbers of the host, on the device."""
        return to_device(torch.from_numpy(np.ascontiguousarray(numbers)), self.device)

    def tried(
        self, function: Callable[..., Tensor], plan: Ints, activations: Sequence[Tensor], shape: tuple[int, ...]
    ) -> Graph | None:
        """A graph; None where the device, or a library, does not let one be recorded: then none is tried any more."""
        try:
            return self.record(function, plan, activations, shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.records = False
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"CUDA graph capture failed, generation is slower: {told}", RuntimeWarning, stacklevel=2)
            return None

    def record(
        self, function: Callable[..., Tensor], plan: Ints, activations: Sequence[Tensor], shape: tuple[int, ...]
    ) -> Graph:
        """A graph of the function, after a run on the same stream, which allocates what libraries keep."""
        mine, given = self.sent(plan), tuple(x.clone() for x in activations)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function(mine, *given, *shape)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out = function(mine, *given, *shape)
        return Graph(graph, mine, given, out)


def bucket(count: int, least: int = 1) -> int:
    """The power of two that so many are filled up to."""
    return max(least, 1 << (count - 1).bit_length())


def filled(index: Ints) -> Ints:
    """Indices filled up to a power of two by the last of them."""
    return np.concatenate([index, index[-1:].repeat(bucket(len(index)) - len(index))])
