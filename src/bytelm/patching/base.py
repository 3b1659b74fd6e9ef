"""The one interface of every patching scheme, and the guard that bounds its patches."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.patching.layout import Rows, at_end, forced_openings, since

SPARED = 4  # in a guarded run of one-byte patches, one proposal in this many still opens a patch


@dataclass(frozen=True)
class PatchState:
    """What a patcher remembers of the ids it has read: how many, and the memory of its scheme."""

    position: Int[Tensor, " batch"]
    memory: Any


class Patcher(nn.Module, abc.ABC):
    """Says, after each byte, whether the NEXT byte opens a patch. n bytes in, n decisions out.

    A decision depends on the bytes read so far and on nothing else; feeding the bytes in any pieces gives the same
    decisions as feeding them whole. PADs are positions that do not exist, and open nothing. Ids, decisions and memory
    are on the host (`bytelm.transfer`); an entropy model computes where its weights are.
    """

    config: Any = None
    """What built it."""

    @abc.abstractmethod
    def memory(self, batch: int) -> Any:
        """What the scheme remembers of rows that have read nothing."""

    @abc.abstractmethod
    def propose(
        self, rows: Rows, forced: Bool[Tensor, "batch new"], memory: Any
    ) -> tuple[Bool[Tensor, "batch new"], Any]:
        """The scheme's decisions, those that are `forced` among them, and its memory after the rows' real ids."""

    def initial_state(self, batch: int) -> PatchState:
        """The state of `batch` rows that have read nothing yet."""
        return PatchState(torch.zeros(batch, dtype=torch.long), self.memory(batch))

    @torch.no_grad()
    def extend(
        self, ids: Int[Tensor, "batch new"], state: PatchState | None = None
    ) -> tuple[Bool[Tensor, "batch new"], PatchState]:
        """Read `ids` after what `state` has read. Returns the decisions and the state to continue from."""
        state = state or self.initial_state(len(ids))
        rows = Rows.of(ids)
        forced = forced_openings(rows.ids, rows.starts(state.position))
        opens, memory = self.propose(rows, forced, state.memory)
        return rows.restore(opens & rows.real), PatchState(state.position + rows.lengths, memory)


@dataclass(frozen=True)
class GuardState:
    """Slots since the last opening that the guard let through, and how many proposals stood in a row."""

    gap: Int[Tensor, " batch"]
    run: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Guard:
    """Bounds the patches of a scheme on runaway input, causally.

    `max_length`: no patch is longer (long runs, where nothing is hard to predict). `max_singles`: after so many
    one-byte patches in a row only every fourth proposal counts (random bytes, where everything is), so that an
    unbroken run of n proposals costs n / 4 global steps. None switches a bound off.
    """

    max_length: int | None
    max_single_byte_run: int | None

    def __post_init__(self) -> None:
        for name in ("max_length", "max_single_byte_run"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f'patching.{name} = {value}: must be at least 1, or "none" for no bound')

    def initial_state(self, batch: int) -> GuardState:
        """The state of rows that have read nothing."""
        zero = torch.zeros(batch, dtype=torch.long)
        return GuardState(zero, zero)

    def apply(
        self,
        proposed: Bool[Tensor, "batch new"],
        forced: Bool[Tensor, "batch new"],
        rows: Rows,
        state: GuardState,
    ) -> tuple[Bool[Tensor, "batch new"], GuardState]:
        """The accepted proposals, with forced openings and those that the length bound adds."""
        # A document starts with an empty run: its patches do not depend on the document before.
        run = since(~proposed | forced, state.run)
        if self.max_single_byte_run is not None:
            proposed = proposed & ((run <= self.max_single_byte_run) | (run % SPARED == 0))
        proposed = proposed | forced
        gap = since(proposed, state.gap)
        opens = proposed
        if self.max_length is not None:
            opens = opens | (gap % self.max_length == 0)
        return opens, GuardState(at_end(gap, rows.lengths, state.gap), at_end(run, rows.lengths, state.run))
