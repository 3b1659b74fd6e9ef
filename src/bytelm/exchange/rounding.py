"""Linear layers and n-gram tables in bfloat16 or int8, rounded while they are read.

int8: symmetric, `X.weight` `[rows, in]` with one float32 scale per row in `X.scale`, bit for bit as
`native.weights.quantised` rounds. Loading restores float32; see `checkpoint.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import PATCHER
from bytelm.checkpoint.tensors import WEIGHT, Stored, Streamed, like, parts, restored, scale_of, scales
from bytelm.errors import UsageError
from bytelm.interfaces.model import ByteModel

Kind = Literal["bf16", "int8"]


@dataclass(frozen=True)
class Precision:
    """What linear layers and n-gram tables are rounded to; None: they stay as they are."""

    weights: Kind | None = None
    tables: Kind | None = None

    def of(self, model: ByteModel) -> dict[str, Kind]:
        """The precision of each tensor that is to be rounded. Raises UsageError for n-gram tables where there are none.

        A patcher stays as it is: patch boundaries depend on every bit of it.
        """
        found = dict[str, Kind]()
        if self.weights is not None:
            modules = model.named_modules()
            names = [name + WEIGHT for name, module in modules if isinstance(module, nn.Linear)]
            found |= dict.fromkeys((name for name in names if not name.startswith(PATCHER)), self.weights)
        if self.tables is not None:
            tables = {id(table.weight) for table in model.lookup_tables()}
            names = [name for name, weight in model.named_parameters() if id(weight) in tables]
            if not names:
                raise UsageError(f"--tables {self.tables}: this model has no n-gram tables: leave it out")
            found |= dict.fromkeys(names, self.tables)
        return found

    def said(self) -> dict[str, str]:
        """What of it is not None."""
        asked = {"weights": self.weights, "tables": self.tables}
        return {name: kind for name, kind in asked.items() if kind is not None}


def rounded(tensors: Stored, kinds: Mapping[str, Kind]) -> Stored:
    """The tensors, those of `kinds` rounded while they are read; one that is in int8 already has its scales beside."""
    pairs = scales((name, like(tensor).dtype, list(like(tensor).shape)) for name, tensor in tensors.items())
    found = dict(tensors)
    for name, kind in kinds.items():
        if name in pairs:
            if kind == "int8":
                continue
            found[name] = plain(tensors[name], found.pop(pairs[name]))
        found |= int8(name, found[name]) if kind == "int8" else {name: bf16(name, found[name])}
    return found


def bf16(name: str, tensor: Tensor | Streamed) -> Tensor | Streamed:
    """A tensor in bfloat16."""

    def cast(piece: Tensor) -> Tensor:
        found = piece.to(torch.bfloat16)
        if bad := store.not_finite(found):
            store.refuse("the rounding to bfloat16", [store.bad_values(name, bad, found.numel())])
        return found

    return tensor if like(tensor).dtype == torch.bfloat16 else mapped(tensor, like(tensor).shape, torch.bfloat16, cast)


def int8(name: str, tensor: Tensor | Streamed) -> dict[str, Streamed]:
    """A weight in int8 and the scales of its rows. It is read twice, since scales are the first in a file."""
    shape = like(tensor).shape
    return {
        name: Streamed(torch.empty(shape, dtype=torch.int8, device="meta"), lambda: quantised(parts(tensor))),
        scale_of(name): mapped(tensor, shape[:1], torch.float32, scales_of),
    }


def scales_of(rows: Tensor) -> Tensor:
    """The scale of each row, in float32."""
    return torch.maximum(rows.amax(1), -rows.amin(1)).float().clamp(min=1e-30) / 127


def quantised(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows in int8, in memory that is taken once: that of fresh tensors costs the system more than the arithmetic."""
    work = torch.empty(0)
    for rows in pieces:
        if work.shape != rows.shape:
            work = torch.empty(rows.shape)
        yield work.copy_(rows).div_(scales_of(rows)[:, None]).round_().to(torch.int8)


def mapped(
    tensor: Tensor | Streamed, shape: torch.Size, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
) -> Streamed:
    """A tensor of which each piece is changed."""
    made = torch.empty(shape, dtype=dtype, device="meta")
    return Streamed(made, lambda: map(change, parts(tensor)))


def plain(weight: Tensor | Streamed, scale: Tensor | Streamed) -> Streamed:
    """A weight in int8 with the scales of its rows, in float32."""
    made = torch.empty(like(weight).shape, device="meta")

    def pieces() -> Iterator[Tensor]:
        whole, at = torch.cat(list(parts(scale))), 0
        for piece in parts(weight):
            yield restored(piece, whole[at : at + len(piece)])
            at += len(piece)

    return Streamed(made, pieces)
