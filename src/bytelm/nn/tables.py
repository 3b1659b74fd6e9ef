"""Embedding tables of a model that was loaded for inference: rows are as they are stored, in memory or in a file.

    index [bags, tables] ─ hashes of the bytes so far
      │ prefetch: the system is asked for the pages of the file
      ▼ rows: from memory, or read from the file's pages
    float32 [bags, dim] ─ the sum of each bag's rows

Rows are read, not mapped into memory: a mapped file that gets shorter kills the process, a read one raises an error.
Pages that were read stay in the system's page cache, which gives them up where memory is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from bytelm.data.files import JoinedReader, PositionReader
from bytelm.native import packing
from bytelm.native.kernels import Kernels
from bytelm.native.packing import Matrix

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RowsInFile:
    """A table `[rows, dim]` in a file, or in several that are read as one, row after row from byte `start` on."""

    file: PositionReader | JoinedReader
    start: int
    like: Tensor
    """On the meta device, of its shape and dtype."""
    scale: Tensor | None = None
    """Of each row, where it is in int8."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.like.shape[1] * self.like.element_size()

    def prefetch(self, index: Ints) -> None:
        """Ask the system for the pages of some rows, without waiting for them."""
        size = self.row_bytes
        for row in index.ravel().tolist():
            self.file.prefetch(self.start + row * size, size)

    def rows(self, index: Ints) -> Matrix:
        """Some rows `[n]`, read now. Raises what `PositionReader.read_into` does."""
        self.file.check()
        size = self.row_bytes
        data = np.empty((len(index), size), np.uint8)
        for row, line in zip(index.tolist(), data, strict=True):
            self.file.read_into(self.start + row * size, line)
        scale = None if self.scale is None else self.scale[torch.from_numpy(index)]
        found = torch.from_numpy(data).view(self.like.dtype)
        return packing.table(found.float() if found.dtype == torch.float16 else found, scale)


class StoredTable(nn.Module):
    """The place of an `nn.Embedding` of which sums of rows are looked up, for inference on the host."""

    def __init__(self, like: Tensor, stored: Matrix | RowsInFile) -> None:
        """`like`: of the table's shape and dtype, on the meta device. `stored`: its rows."""
        super().__init__()
        like = like.float() if like.dtype == torch.float16 else like  # kernels are given those rows in float32
        self.weight = nn.Parameter(like, requires_grad=False)
        self.file = stored if isinstance(stored, RowsInFile) else None
        if isinstance(stored, Matrix):
            packing.hold(self.weight, stored)

    def prefetch(self, index: Ints) -> None:
        """Have rows of a file ready for when they are asked for."""
        if self.file:
            self.file.prefetch(index)

    def add(self, kernels: Kernels, index: Ints, x: NDArray[Any]) -> None:
        """Add rows `index` [bags, tables] to `x` [bags, dim], in place."""
        if self.file:
            table, index = self.file.rows(index.ravel()), np.arange(index.size).reshape(index.shape)
        else:
            table = kernels.table(self.weight)
        kernels.bags(table, index, x)

    def summed(self, index: Int[Tensor, "bags tables"]) -> Float[Tensor, "bags dim"]:
        """The sum of each bag's rows."""
        places, found = index.numpy(), np.zeros((len(index), self.weight.shape[1]), np.float32)
        self.prefetch(places)
        self.add(Kernels.open(), places, found)
        return torch.from_numpy(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTable:
        """Itself: it does not change."""
        return self
