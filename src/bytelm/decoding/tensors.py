"""The operations of the device backend: weights, embeddings, matmuls and norms as tensors.

bfloat16 weights and caches stay bfloat16; activations between layers, norms and logits are float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bytelm.decoding.graphs import Recorder
from bytelm.interfaces.decoder import Ints, Reals, fetched
from bytelm.native.kernels import Kernels
from bytelm.nn import fused
from bytelm.nn.norm import EPS

CHUNK = 256  # ids of one row per call at most


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight `[out, in]`."""

    weight: Tensor

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """The matmul, in the precision of the weight."""
        return F.linear(x.to(self.weight.dtype), self.weight)


T = TypeVar("T", bound="Tensors")


@dataclass(frozen=True)
class Tensors:
    """See `Backend`: activations are tensors of `dtype` on a device."""

    device: torch.device
    dtype: torch.dtype
    weights: str | None
    """Quantization of linear layers: "bf16", or None for `dtype`."""
    host: Kernels
    recorder: Recorder = field(repr=False)

    chunk = CHUNK
    repeats = False  # libraries round differently in a batch
    prefills = False
    thread_pool = None

    @classmethod
    def open(cls: type[T], device: torch.device, exact: bool, weights: str | None) -> T:
        """A device backend. Raises UsageError without the host kernels, which decide boundaries."""
        dtype = torch.float64 if exact else torch.float32
        return cls(device, dtype, weights, Kernels.open(exact), Recorder(device))

    @property
    def stored(self) -> torch.dtype:
        """The dtype of weights and caches."""
        return torch.bfloat16 if self.weights else self.dtype

    def precise(self: T) -> T:
        """See `Backend`."""
        return replace(self, weights=None)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros on the device."""
        with torch.inference_mode(False):  # writable in any mode
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def vector(self, weight: Tensor) -> Tensor:
        """See `Backend`."""
        return weight.detach().to(self.dtype)

    def table(self, weight: Tensor) -> Tensor:
        """See `Backend`."""
        return weight.detach()

    def matrix(self, weight: Tensor, *, whole: bool = False) -> Matrix:
        """See `Backend`; not a copy if the precision is right already."""
        return Matrix(weight.detach() if whole else weight.detach().to(self.stored))

    def embed(self, table: Tensor, ids: Ints) -> Tensor:
        """See `Backend`."""
        return F.embedding(self.recorder.sent(ids), table).to(self.dtype)

    def linear(self, matrix: Matrix, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """See `Backend`. After a norm come logits, which are not rounded."""
        if norm is None:
            return matrix(x).to(self.dtype)
        return F.linear(self.normed(x, norm, eps), matrix.weight.to(self.dtype))

    def normed(self, x: Tensor, weight: Tensor, eps: float, kind: torch.dtype | None = None) -> Tensor:
        """See `Backend`; rounded to `kind` for a matmul."""
        kind = kind or self.dtype
        if device := fused.kernels(x):
            return device.rms_norm(x, weight, eps, kind)
        return F.rms_norm(x, weight.shape, weight, eps).to(kind)

    def ready(self, x: Tensor, weight: Tensor) -> Tensor:
        """After RMSNorm, in the precision of weights."""
        return self.normed(x, weight, EPS, self.stored)

    def instead(self, x: Tensor, where: NDArray[np.bool_], line: Tensor) -> Tensor:
        """See `Backend`."""
        return torch.where(self.recorder.sent(where)[:, None], line, x)

    def entropies(self, logits: Tensor) -> Reals:
        """See `Backend`: one synchronisation."""
        chances = logits.log_softmax(-1)
        return fetched(-(chances.exp() * chances).sum(-1))
