"""What `compare` needs of an architecture: candidates, each in every size.

`sizes.py` of an architecture has `FAMILIES`, families of candidates by the names that `--models` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HEADS = (32, 48, 16)  # widths of a head, the first that divides the width; kernels want multiples of 16
WIDE, WIDE_HEADS = 512, (64, *HEADS)  # from this width on: what kernels of GPUs are made for

Table = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A kind of model. `shape(width, odd, number)` is its table [model]: as wide as `width` where it works on bytes,
    `odd` layers deeper than usual. `rate`: its learning rate at width 128; at others the inverse root of the width.
    Without one it is that of every training.
    """

    shape: Callable[[int, int, int], Table]
    rate: float | None = None
    number: int = 0
    """What may follow the name, where something may; this is what it is otherwise."""
    least: int = 1
    tables: Callable[[int], Table] = field(default=lambda number: {})
    """The other tables of a run."""
    tokens: bool = False
    """Whether it reads tokens, and the number is that of its vocabulary."""


def usual(width: int) -> int:
    """Layers that go with a width."""
    return 2 + width // 64


def heads(width: int) -> int:
    """Heads of a width."""
    return width // next(head for head in (WIDE_HEADS if width >= WIDE else HEADS) if width % head == 0)
