"""Constraints: which ids may come next in one row."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.generate.utf8 import Utf8State


@runtime_checkable
class Constraint(Protocol):
    """Decides which ids of one row may come next; it is told what came."""

    def allowed(self, left: int) -> NDArray[np.bool_]:
        """The ids `[vocab]` that may come next when at most `left` more bytes may: EOS where the text may end."""
        ...

    def extend(self, symbol: int) -> None:
        """Read the id that was generated."""
        ...


class Utf8Constraint:
    """Valid UTF-8 that continues a prompt, and ends with a whole character: see `utf8.Utf8State`."""

    def __init__(self, prompt: bytes) -> None:
        self.state = Utf8State.after([prompt])

    def allowed(self, left: int) -> NDArray[np.bool_]:
        """See `Constraint`."""
        return self.state.allowed(left).numpy()[0]

    def extend(self, symbol: int) -> None:
        """See `Constraint`."""
        self.state = self.state.extend(torch.tensor([symbol]))
