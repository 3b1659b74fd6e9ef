"""What a memory is made of: the names of its predictors, and how many bytes it may have."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from bytelm.errors import ConfigError
from bytelm.find import find

SMALLEST, LARGEST = 1 << 20, 1 << 36
CONTEXTS, MATCHES = 24, 4  # at most
ORDERS = tuple(f"order:{n}" for n in (0, 1, 2, 3, 4, 5, 6, 8))
TEXT = (*ORDERS, "word", "words", "column", "sparse", "indirect", "match:5", "match:10", "match:24")


@dataclass(frozen=True)
class Settings:
    """Which predictors, each a file of `predictors` and a number after a colon where it takes one, and the size.

    `memory` bytes are not exceeded by much: tables are the largest powers of two that fit (`Memory.bytes` says).
    """

    predictors: tuple[str, ...] = TEXT
    memory: int = 128 << 20

    def __post_init__(self) -> None:
        if not SMALLEST <= self.memory <= LARGEST:
            raise ConfigError(f"online.memory = {self.memory}: must be from {SMALLEST} to {LARGEST} bytes")
        for which, most in ((self.contexts, CONTEXTS), (self.matches, MATCHES)):
            if len(which) > most:
                raise ConfigError(
                    f"online.predictors: {len(which)} like {which[-1].name}, at most {most}: leave some out"
                )
        if not self.contexts:
            raise ConfigError('online.predictors: none of them is a context model: add "order:0"')
        if len(set(self.predictors)) < len(self.predictors):
            raise ConfigError("online.predictors: one is named twice: leave it out once")
        if len(",".join(self.predictors)) > 900:
            raise ConfigError("online.predictors: 900 characters at most: leave some out")

    @property
    def contexts(self) -> tuple[Named, ...]:
        """The predictors that look a context up, in their order."""
        return tuple(named for named in map(Named.of, self.predictors) if not named.matches)

    @property
    def matches(self) -> tuple[Named, ...]:
        """The match models, in their order."""
        return tuple(named for named in map(Named.of, self.predictors) if named.matches)


@dataclass(frozen=True)
class Named:
    """A predictor and its numbers, the first one in the lowest bits of `parameter`, as many as its largest needs."""

    name: str
    module: ModuleType
    parameter: int

    @classmethod
    def of(cls, text: str) -> Named:
        """From "order:3" or "word". Raises ConfigError."""
        name, *given = text.split(":")
        module = find("online.predictors", name)
        ranges: tuple[tuple[int, int], ...] = module.PARAMETERS
        if len(given) != len(ranges) or not all(number.isascii() and number.isdigit() for number in given):
            takes = name + ":NUMBER" * len(ranges) if ranges else f"{name} without a number"
            raise ConfigError(f"online.predictors: {text!r}: give {takes}")
        parameter = bits = 0
        for number, (low, high) in zip(given, ranges, strict=True):
            if len(number) > 9 or not low <= int(number) <= high:
                which = "the number" if len(ranges) == 1 else number
                raise ConfigError(f"online.predictors: {text!r}: {which} must be from {low} to {high}")
            parameter |= int(number) << bits
            bits += high.bit_length()
        return cls(text, module, parameter)

    @property
    def matches(self) -> bool:
        """Whether it is a match model."""
        return self.module.__name__.endswith(".match")
