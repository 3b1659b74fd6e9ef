"""Functions of plans and activations, captured as CUDA graphs if possible: one launch instead of many.

Graphs have fixed shapes: plans are padded to powers of two, so that there are few shapes.
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

GRAPHED = 256  # positions above which arithmetic dominates launches, and no graph is captured


class Graphs:
    """The graphs of one function of a plan and activations, one per shape. The function must not synchronise.

    The first call of a shape computes eagerly, the second captures: a shape that is used once needs no graph. What the
    function writes is idempotent, at fixed addresses.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.met = set[Any]()
        self.found: dict[Any, Graph] = {}

    def __call__(
        self, function: Callable[..., Tensor], plan: Ints, *activations: Tensor, shape: tuple[int, ...] = ()
    ) -> Tensor:
        """The result of the function. `plan` [integers, ...] is copied; `shape`: further host integers of the shape.

        The function is not stored: a method would keep its owner alive, and with it the memory that it writes to.
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
    """A captured function, with its static inputs."""

    graph: Any
    plan: Tensor
    activations: tuple[Tensor, ...]
    out: Tensor

    def replay(self, plan: Ints, activations: Sequence[Tensor]) -> Tensor:
        """Replay with these inputs."""
        self.plan.copy_(torch.from_numpy(plan).pin_memory(), non_blocking=True)
        for mine, given in zip(self.activations, activations, strict=True):
            mine.copy_(given)
        self.graph.replay()
        # Graphs share a memory pool: another graph may overwrite the output.
        return self.out.clone()


class Recorder:
    """The device, and the memory pool that graphs share."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.records = device, device.type == "cuda"
        if self.records:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def sent(self, numbers: NDArray[Any]) -> Tensor:
        """Copy a host array to the device."""
        return to_device(torch.from_numpy(np.ascontiguousarray(numbers)), self.device)

    def tried(
        self, function: Callable[..., Tensor], plan: Ints, activations: Sequence[Tensor], shape: tuple[int, ...]
    ) -> Graph | None:
        """A graph; None if capture is unsupported or fails, after which it is not tried again."""
        try:
            return self.record(function, plan, activations, shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.records = False
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"CUDA graph capture failed, generation is slower: {reason}", RuntimeWarning, stacklevel=2)
            return None

    def record(
        self, function: Callable[..., Tensor], plan: Ints, activations: Sequence[Tensor], shape: tuple[int, ...]
    ) -> Graph:
        """Capture, after a warm-up on the same stream, in which libraries allocate their workspaces."""
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
    """The power of two to which so many are padded."""
    return max(least, 1 << (count - 1).bit_length())


def filled(index: Ints) -> Ints:
    """Indices padded to a power of two by repeating the last."""
    return np.concatenate([index, index[-1:].repeat(bucket(len(index)) - len(index))])
