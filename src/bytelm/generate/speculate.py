"""Self-speculation: the local model drafts, one full pass verifies (Fast BLT's BLT-S), on where it is measured to pay.

Drafting changes nothing that is written: a draft is kept as far as it is what the full model would have drawn anyway,
from the same noise. So whether to draft, and how far, may be chosen by the clock; and so may the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LENGTHS = (0, 4, 8)  # bytes to draft; 0 is to read byte by byte
TRIAL = 3  # steps after which an option is judged
FEW = 8  # steps after which it is first looked whether fewer threads are faster
REST, LONGEST = 64, 512  # steps until the others are tried again, twice as many each time that the same one wins


@dataclass
class Fastest:
    """Chooses among a few ways to take a step: the fastest by bytes a second, all tried again now and then."""

    options: tuple[int, ...]
    """The first of them is begun with."""
    trial: int = TRIAL
    ahead: float = 1.0
    """By how much the first of them must be outrun."""
    rest: int = REST
    """Steps between two trials of all."""
    rates: dict[int, float] = field(default_factory=dict[int, float])
    steps: int = 0
    """Steps with the present option, the bytes that they wrote, and what they took."""
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
        """What a step with this option took, and how many bytes it wrote."""
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
        """Go on with the fastest."""
        first = self.options[0]
        fastest = max(self.rates, key=lambda option: self.rates[option] * (self.ahead if option == first else 1))
        self.rest = min(2 * self.rest, LONGEST) if fastest == self.best else REST
        self.best = fastest


@dataclass
class Speculation(Fastest):
    """How many bytes to draft."""

    options: tuple[int, ...] = LENGTHS
    drafted: int = 0
    accepted: int = 0
    """Of the bytes that were drafted, those that the full model wrote too."""


def threads(most: int) -> Fastest:
    """All threads, or one.

    Threads wait for each other many times a byte. Beside another busy program, each wait for one that the system has
    taken off its processor takes milliseconds, and one thread alone is fifty times as fast.
    """
    return Fastest((most, 1), trial=1, ahead=3.0, rest=FEW)
