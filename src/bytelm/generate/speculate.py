"""Speculative decoding: bytes are guessed, one pass of the model reads them all, and what it agrees with is kept.

Two sources of guesses, tried only where measured throughput says so:
- the local model, where the architecture has one (self-speculation: Fast BLT's BLT-S);
- an online memory of the row's own bytes (`online.memory`), and of what it has read before, if one is given: a
  context-mixing model in the place of the n-gram lookup of prompt lookup decoding. It needs no training and no weights.

It is lossless: a guess is accepted as far as it equals what the model itself samples with the same noise, see
`sampling.draw`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bytelm.decoding import Decoder
from bytelm.generate.sampling import Ints, Reals
from bytelm.native.online import kernel
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.threads import ThroughputTuner
from bytelm.units import BYTES, VOCAB

COLD = Settings(memory=8 << 20)  # of a memory that begins empty: it reads one document
TAIL = 1 << 14  # bytes of a document that such a memory reads at most, a tenth of a second's worth
LEAST = 0.15  # probability of a guess, and of all before it, below which no more are made (not tuned)
SLOW = 2e-3  # seconds a byte from which guesses by a memory can pay: each costs a tenth of that
FIRST = 16  # steps before the first trial, which takes as many
TRIAL = 6


class Draft(NamedTuple):
    """Where guesses come from, and how many bytes are guessed for one pass, at most."""

    source: Literal["none", "local", "memory"]
    length: int


NONE, MEMORY = Draft("none", 0), Draft("memory", 12)
LOCAL = (Draft("local", 4), Draft("local", 8))


def drafts_of(decoder: Decoder) -> tuple[Draft, ...]:
    """What may be tried with a decoder."""
    by_memory = decoder.rolls_back and decoder.tokens is None
    return (NONE, *(LOCAL if decoder.drafts else ()), *((MEMORY,) if by_memory else ()))


class Alone(ThroughputTuner[Draft]):
    """Chooses for a row that writes alone: there a memory may guess, if the model is slow enough."""

    def trials(self) -> list[Draft]:
        """See `ThroughputTuner`."""
        found = super().trials()
        if MEMORY in found and (self.seconds < SLOW * self.bytes or kernel() is None):
            found.remove(MEMORY)
        return found


class Speculation:
    """What to draft: chosen apart for a row that writes alone, and for several, which share the reading of weights."""

    def __init__(self, options: Iterable[Draft]) -> None:
        """The first of the options is the default."""
        options = tuple(options)
        together = tuple(draft for draft in options if draft.source != "memory") or (NONE,)
        self.alone = Alone(options, trial=TRIAL, rest=FIRST)
        self.together = ThroughputTuner(together, trial=TRIAL, rest=FIRST)
        self.drafted = 0
        self.accepted = 0
        """Accepted draft bytes."""

    def tuner(self, rows: int) -> ThroughputTuner[Draft]:
        """The one that chooses for so many rows."""
        return self.alone if rows == 1 else self.together


@dataclass
class Guesser:
    """Guesses the next bytes of one row by a memory of it."""

    memory: Memory
    seen: int = 0
    """Ids of the row that it has followed."""

    @classmethod
    def begun(cls, read_before: Callable[[], Memory] | None) -> Guesser:
        """With a memory of its own that has read something, or with an empty one."""
        return cls(read_before() if read_before else Memory(COLD))

    def follow(self, ids: Ints) -> None:
        """Learn what the row has read since. `ids`: all of its document."""
        new = ids[self.seen :]
        self.memory.learn(new[new < BYTES][-TAIL:].astype(np.uint8))
        self.seen = len(ids)

    def guess(self, most: int, choose: Callable[[Reals, int], int]) -> list[int]:
        """At most so many bytes, while they are likely enough. `choose`: from logits `[1, vocab]`, for the nth byte."""
        found, likely = list[int](), 1.0
        self.memory.mark()
        while len(found) < most:
            logits = np.full((1, VOCAB), -np.inf, np.float32)
            logits[0, :BYTES] = logs = self.memory.log_probabilities()
            symbol = choose(logits, len(found))
            likely *= float(np.exp(logs[symbol]))
            if likely < LEAST:
                break
            found.append(symbol)
            self.memory.update(symbol)
        self.memory.undo()
        return found
