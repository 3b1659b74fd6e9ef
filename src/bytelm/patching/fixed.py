"""Patches of a fixed number of bytes, counted from the start of the document (MEGABYTE; BLT's "static")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from bytelm.patching.base import Guard, GuardState, Patcher
from bytelm.patching.layout import Rows


@dataclass(frozen=True)
class Config:
    """`size`: bytes in a patch."""

    uses_entropy_model: ClassVar[bool] = False

    size: int = 4

    def __post_init__(self) -> None:
        self.guard()

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes that together cover every path of this file, for the invariant tests."""
        return {"1": cls(1), "4": cls(4)}

    def guard(self) -> Guard:
        """A fixed patch is what is left of a scheme that proposes nothing and is bounded in length."""
        return Guard(max_length=self.size, max_single_byte_run=None)

    def build(self) -> Fixed:
        """The patcher of this configuration."""
        return Fixed(self)


class Fixed(Patcher):
    """BOS | size bytes | size bytes | ..."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.guard = config.guard()

    def memory(self, batch: int) -> GuardState:
        """Bytes in the patch so far."""
        return self.guard.initial_state(batch)

    def propose(
        self, rows: Rows, forced: Bool[Tensor, "batch new"], memory: GuardState
    ) -> tuple[Bool[Tensor, "batch new"], GuardState]:
        """Nothing but what is forced, and the bound on length."""
        return self.guard.apply(forced, forced, rows, memory)
