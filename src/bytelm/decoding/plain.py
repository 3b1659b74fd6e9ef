"""A decoder for any model, by its forward pass: for plugins, and without a C++ compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bytelm.errors import UsageError
from bytelm.interfaces.decoder import Decoder, Ints, NewTokens, Reals
from bytelm.interfaces.model import ByteModel
from bytelm.nn.state import join_rows, map_state, take_rows
from bytelm.units import PAD


@dataclass(frozen=True)
class Group:
    """Rows whose states are batched, in this order."""

    rows: tuple[int, ...]
    state: Any


class PlainDecoder(Decoder):
    """Rows that are read together stay batched, so that a step of the same rows moves no state."""

    rolls_back = False
    repeats = False  # torch rounds differently in a batch
    chunk = 1024

    def __init__(self, model: ByteModel, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity)
        self.model, self.tokens = model, model.tokens
        self.groups: list[Group] = []

    def rollback(self, rows: Ints, lengths: Ints) -> None:
        """To 0, or to the present lengths. Raises UsageError for others: states cannot be rolled back."""
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            if length not in (0, self.lengths[row]):
                raise UsageError(f"a sequence of {self.lengths[row]} ids cannot be rolled back to {length}: only to 0")
        super().rollback(rows, lengths)
        self.forget(set(rows[lengths == 0].tolist()))

    def reusable(self, row: int, length: int) -> int:
        """See `Decoder`: all of it or nothing."""
        return length if self.lengths[row] == length else 0

    def forget(self, rows: set[int]) -> None:
        """Drop the states of these rows."""
        left = [(group, [i for i, row in enumerate(group.rows) if row not in rows]) for group in self.groups]
        self.groups = [self.part(group, which) for group, which in left if which]

    @torch.inference_mode()
    def logits_after(self, new: NewTokens) -> Reals:
        """See `Decoder`. Rows with one new id and rows with more are read separately, to avoid padding."""
        rows, begin, count = np.unique(new.row, return_index=True, return_counts=True)
        exact = next(self.model.parameters()).dtype == torch.float64
        logits = np.empty((len(new.row), self.vocabulary), np.float64 if exact else np.float32)
        for some in (count == 1, count > 1):
            if some.any():
                where = [np.arange(a, a + n) for a, n in zip(begin[some], count[some], strict=True)]
                self.together(new, rows[some], where, logits)
        return logits

    def together(self, new: NewTokens, rows: Ints, where: list[Ints], logits: Reals) -> None:
        """Read some rows in one call; `where`: indices of their new ids."""
        width = max(map(len, where))
        ids, opens = np.full((len(rows), width), PAD), np.zeros((len(rows), width), bool)
        for line, opened, slots in zip(ids, opens, where, strict=True):
            line[: len(slots)] = new.ids[slots]
            if new.opens is not None:
                opened[: len(slots)] = new.opens[slots]
        fresh = [int(row) for row, slots in zip(rows, where, strict=True) if new.position[slots[0]] == 0]
        state = self.gathered(tuple(map(int, rows)), fresh)
        boundaries = None if new.opens is None else torch.from_numpy(opens)
        found, state = self.model(torch.from_numpy(ids).to(self.model.device), state, boundaries)
        self.groups.append(Group(tuple(map(int, rows)), state))
        found = found.cpu().to(torch.from_numpy(logits).dtype).numpy()
        for line, slots in zip(found, where, strict=True):
            logits[slots] = line[: len(slots)]

    def gathered(self, rows: tuple[int, ...], fresh: list[int]) -> Any:
        """The batched state of these rows, removed from their groups; those of others stay."""
        mine = [(group, [i for i, row in enumerate(group.rows) if row in rows]) for group in self.groups]
        parts = [self.part(group, which) for group, which in mine if which]
        self.forget(set(rows))
        if fresh:
            parts.append(Group(tuple(fresh), self.model.initial_state(len(fresh))))
        order = [row for part in parts for row in part.rows]
        state = parts[0].state if len(parts) == 1 else join_rows([part.state for part in parts])
        return state if order == list(rows) else self.take(state, [order.index(row) for row in rows])

    def part(self, group: Group, which: list[int]) -> Group:
        """Some rows of a group."""
        if len(which) == len(group.rows):
            return group
        return Group(tuple(group.rows[i] for i in which), self.take(group.state, which))

    def take(self, state: Any, rows: list[int]) -> Any:
        """Select rows of a state."""
        return take_rows(state, torch.tensor(rows, device=self.model.device))

    @property
    def row_bytes(self) -> int:
        """See `Decoder`; of the longest row so far, as the states of plugins are not known in advance."""
        found = [0]

        def count(tensor: torch.Tensor) -> torch.Tensor:
            found[-1] += tensor.nbytes
            return tensor

        for group in self.groups:
            found.append(0)
            map_state(count, group.state)
            found[-1] //= len(group.rows)
        return max(found)

    def traffic(self, length: int) -> float:
        """See `Decoder`: all parameters, and the present states."""
        tables = {id(table.weight) for table in self.model.lookup_tables()}
        weights = sum(p.nbytes for p in self.model.parameters() if id(p) not in tables)
        return weights + self.rows * self.row_bytes
