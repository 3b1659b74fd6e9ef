"""Patches that end after a space-like byte: SpaceByte's rule, which the BLT paper takes as "space patching".

    "The quick fox, jumps" is cut as "The |quick |fox,| jumps": of several space-like bytes only the first ends a patch

Space-like is every byte that is neither an ASCII letter or digit nor a UTF-8 continuation byte (0x80-0xBF).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from bytelm.patching.base import Guard, GuardState, Patcher
from bytelm.patching.layout import Rows, at_end
from bytelm.units import VOCAB


@dataclass(frozen=True)
class Config:
    """Bounds on runaway input: see `Guard`."""

    uses_entropy_model: ClassVar[bool] = False

    max_length: int | None = 32
    max_single_byte_run: int | None = 16

    def __post_init__(self) -> None:
        self.guard()

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes that together cover every path of this file, for the invariant tests."""
        return {"bounded": cls(max_length=9, max_single_byte_run=5), "unbounded": cls(None, None)}

    def guard(self) -> Guard:
        """The guard of this configuration."""
        return Guard(self.max_length, self.max_single_byte_run)

    def build(self) -> Space:
        """The patcher of this configuration."""
        return Space(self)


@dataclass(frozen=True)
class SpaceMemory:
    """Whether the last byte was space-like, and the guard's state."""

    spacelike: Bool[Tensor, " batch"]
    guard: GuardState


def spacelike_table() -> Bool[Tensor, " vocab"]:
    """Whether each id is space-like; the specials are."""
    word = [bytes([b]).isalnum() or 0x80 <= b <= 0xBF for b in range(256)]
    # In no checkpoint, so that it must be there when a model is made on the meta device.
    return ~torch.tensor(word + [False] * (VOCAB - 256), device="cpu")


class Space(Patcher):
    """The byte after a space-like byte opens a patch, unless the one before that was space-like too."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.guard = config.guard()
        self.table = spacelike_table()  # no buffer: it is looked up on the host, whatever the model's device

    def memory(self, batch: int) -> SpaceMemory:
        """Nothing read counts as space-like, as a BOS does."""
        return SpaceMemory(torch.ones(batch, dtype=torch.bool), self.guard.initial_state(batch))

    def propose(
        self, rows: Rows, forced: Bool[Tensor, "batch new"], memory: SpaceMemory
    ) -> tuple[Bool[Tensor, "batch new"], SpaceMemory]:
        """SpaceByte's rule under the guard."""
        spacelike = self.table[rows.ids]
        before = torch.cat([memory.spacelike[:, None], spacelike], 1)[:, : spacelike.shape[1]]
        opens, guard = self.guard.apply(spacelike & ~before, forced, rows, memory.guard)
        return opens, SpaceMemory(at_end(spacelike, rows.lengths, memory.spacelike), guard)
