"""When a training ends, and how much of the way there it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """Limits of one training, None where there is none: it ends at the first that is reached."""

    steps: int | None = None
    bytes: int | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> Budget:
        """The budget in a table [train], where "none" is no limit."""
        return cls(*(None if train.get(name) == "none" else train.get(name) for name in ("steps", "bytes", "minutes")))

    def fraction(self, step: int, bytes: int, seconds: float) -> float:
        """How much of it is used up, 1 at the end: the largest fraction of any limit; 0 where nothing is limited."""
        seconds_limit = None if self.minutes is None else 60 * self.minutes
        reached = ((step, self.steps), (bytes, self.bytes), (seconds, seconds_limit))
        return max((done / limit for done, limit in reached if limit is not None), default=0.0)

    def expected_bytes(self, step_bytes: int, bytes_per_second: float) -> float:
        """The bytes that are read until it is used up, at this speed. Raises ValueError where nothing is limited."""
        steps = None if self.steps is None else self.steps * step_bytes
        minutes = None if self.minutes is None else 60 * self.minutes * bytes_per_second
        return min(limit for limit in (steps, self.bytes, minutes) if limit is not None)
