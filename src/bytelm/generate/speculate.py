"""Self-speculative decoding: the local model drafts, one full pass verifies (Fast BLT's BLT-S), if that is faster.

Drafting is lossless: a draft is accepted as far as it equals what the full model samples with the same noise.
So the draft length, and the number of threads, are chosen from measured throughput.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LENGTHS = (0, 4, 8)  # draft lengths in bytes; 0: no drafting
TRIAL = 3  # steps after which an option is judged
FEW = 8  # steps until the first trial of fewer threads
REST, LONGEST = 64, 512  # steps until the others are tried again, twice as many each time that the same one wins


@dataclass
class ThroughputTuner:
    """Chooses the option with the highest measured throughput; all are tried again periodically."""

    options: tuple[int, ...]
    """The first one is the default."""
    trial: int = TRIAL
    ahead: float = 1.0
    """The required speed-up over the default."""
    rest: int = REST
    """Steps between two trials of all."""
    rates: dict[int, float] = field(default_factory=dict[int, float])
    steps: int = 0
    """Steps with the current option, their bytes and seconds."""
    bytes: int = 0
    seconds: float = 0.0
    queue: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self.best = self.options[0]

    @property
    def option(self) -> int:
        """The one for the next step."""
        return self.queue[0] if self.queue else self.best

    def note(self, seconds: float, written: int) -> None:
        """Record the seconds and bytes of a step with this option."""
        self.steps, self.bytes, self.seconds = self.steps + 1, self.bytes + written, self.seconds + seconds
        if self.steps < (self.trial if self.queue else self.rest) or len(self.options) == 1:
            return
        if self.queue:
            self.rates[self.queue.pop(0)] = self.bytes / self.seconds
            if not self.queue:
                self.settle()
        else:
            self.rates[self.best] = self.bytes / self.seconds
            self.queue = [option for option in self.options if option != self.best]
        self.steps, self.bytes, self.seconds = 0, 0, 0.0

    def settle(self) -> None:
        """Switch to the fastest."""
        first = self.options[0]
        fastest = max(self.rates, key=lambda option: self.rates[option] * (self.ahead if option == first else 1))
        self.rest = min(2 * self.rest, LONGEST) if fastest == self.best else REST
        self.best = fastest


@dataclass
class Speculation(ThroughputTuner):
    """How many bytes to draft."""

    options: tuple[int, ...] = LENGTHS
    drafted: int = 0
    accepted: int = 0
    """Accepted draft bytes."""


def threads(most: int) -> ThroughputTuner:
    """All threads, or one.

    Threads synchronize many times per byte. Beside another busy program, each wait for a descheduled thread
    takes milliseconds, and a single thread is fifty times as fast.
    """
    return ThroughputTuner((most, 1), trial=1, ahead=3.0, rest=FEW)
