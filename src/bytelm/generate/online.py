"""Generation beside an online memory: it learns the prompt and what is written, and bytes are drawn from both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelm.generate.sampling import Ints, Reals
from bytelm.online.memory import Memory, among_bytes
from bytelm.units import BYTES


@dataclass
class OnlineRow:
    """The memory of one row, which has learnt all its bytes so far."""

    memory: Memory
    place: NDArray[np.float32] | None = None
    """The model's log-probabilities of the bytes in the place that is written next `[256]`."""

    @classmethod
    def begun(cls, memory: Memory | None) -> OnlineRow | None:
        """With a copy of a memory; None for none. Raises ResourceError where there is no room for it."""
        return None if memory is None else cls(memory.clone())

    def learn(self, ids: Ints, logits: Reals) -> None:
        """Learn ids `[n]`, each with the model's logits in its place `[n, vocab]`; what is no byte is passed over."""
        data = ids < BYTES
        self.memory.learn(ids[data].astype(np.uint8), among_bytes(logits[data]))

    def mixed(self, logits: Reals) -> Reals:
        """The model's logits `[vocab]` of the next place as both have them.

        The probability of all bytes together, and those of the specials, are the model's.
        """
        self.place = among_bytes(logits[None])[0]
        found = logits.copy()
        together = np.logaddexp.reduce(logits[:BYTES].astype(np.float64))
        found[:BYTES] = self.memory.log_probabilities(self.place) + together
        return found

    def update(self, symbol: int) -> None:
        """Learn what was written in that place."""
        if symbol < BYTES:
            self.memory.update(symbol, self.place)
