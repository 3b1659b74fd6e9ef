"""Steps whose loss or gradient is far above what it was lately: one bad batch should not undo a day of learning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

RECENT = 64  # steps that went well, which a step is compared with once there are as many
DEVIATIONS = 6.0  # of theirs, that a spike lies above their mean
TIMES = 2.0  # their mean, that a spike exceeds too: where all are nearly equal, deviations say little
IN_A_ROW = 5  # steps that may be left out: more are no spike but another level, which is learnt from


class Spikes:
    """Figures of recent steps by name, as losses and gradient norms. `state` is all there is to it, in plain JSON."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        told = state or {"recent": {}, "in_a_row": 0}
        self.recent = {name: deque[float](map(float, values), RECENT) for name, values in told["recent"].items()}
        self.in_a_row = int(told["in_a_row"])

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run leaves out the same steps."""
        return {"recent": {name: list(values) for name, values in self.recent.items()}, "in_a_row": self.in_a_row}

    def judge(self, **values: float) -> str | None:
        """Why a step of these (finite) values is to be left out, or None; then it counts among the recent ones."""
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
