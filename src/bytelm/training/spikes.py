"""Detection of loss and gradient spikes: one bad batch should not undo a day of training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

RECENT = 64  # recent accepted steps that a step is compared with
DEVIATIONS = 6.0  # standard deviations of a spike above their mean
TIMES = 2.0  # times their mean that a spike exceeds too, for nearly constant values
IN_A_ROW = 5  # consecutive steps that may be skipped: more are a new level, not a spike


class Spikes:
    """Values of recent steps by name: losses and gradient norms. `state` is plain JSON."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        told = state or {"recent": {}, "in_a_row": 0}
        self.recent = {name: deque[float](map(float, values), RECENT) for name, values in told["recent"].items()}
        self.in_a_row = int(told["in_a_row"])

    @property
    def state(self) -> dict[str, Any]:
        """Saved in checkpoints, so that a resumed run skips the same steps."""
        return {"recent": {name: list(values) for name, values in self.recent.items()}, "in_a_row": self.in_a_row}

    def judge(self, **values: float) -> str | None:
        """Why a step with these (finite) values must be skipped; None if accepted, and then recorded."""
        reasons = [
            f"{name} {value:.4g} is far above {_mean(recent):.4g}, the mean of {RECENT} steps"
            for name, value in values.items()
            if len(recent := self.recent.setdefault(name, deque(maxlen=RECENT))) == RECENT and value > _limit(recent)
        ]
        if reasons and self.in_a_row < IN_A_ROW:
            self.in_a_row += 1
            return " and ".join(reasons)
        for name, value in values.items():
            if reasons:
                self.recent[name].clear()
            self.recent[name].append(value)
        self.in_a_row = 0
        return None


def _mean(values: Sequence[float] | deque[float]) -> float:
    return sum(values) / len(values)


def _limit(values: deque[float]) -> float:
    """The least that is no spike among these."""
    mean = _mean(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return max(mean + DEVIATIONS * deviation, TIMES * mean)
