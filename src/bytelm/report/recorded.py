"""Curves, events and sums from the lines of `read_history`. Unknown kinds and fields are ignored."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Metrics = Sequence[Mapping[str, object]]
Series = Sequence[tuple[float, float]]

POINTS = 120  # per line; more are averaged in groups


def number(value: object) -> float | None:
    """A finite number, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def of_kind(metrics: Metrics, *kinds: str) -> list[Mapping[str, object]]:
    """The lines of some kinds, in order."""
    return [line for line in metrics if line.get("kind") in kinds]


def curve(metrics: Metrics, kind: str, y: str = "bits_per_byte", x: str = "bytes") -> list[tuple[float, float]]:
    """(x, y) of the lines of one kind; of a step repeated after a resume, the last line counts."""
    found: dict[object, tuple[float, float]] = {}
    for line in of_kind(metrics, kind):
        at, value = number(line.get(x)), number(line.get(y))
        if at is not None and value is not None:
            found[line.get("step", at)] = (at, value)
    return sorted(found.values())


def thinned(points: Series, most: int = POINTS) -> Series:
    """Means of neighbours, at most so many."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


@dataclass(frozen=True)
class Clock:
    """The step and the seconds of training after a number of processed bytes."""

    bytes: Sequence[float]
    steps: Sequence[float]
    seconds: Sequence[float]

    @classmethod
    def of(cls, metrics: Metrics) -> Clock:
        """From every training and validation line; all start at 0."""
        rows = {(0.0, 0.0, 0.0)}
        for line in of_kind(metrics, "train", "validation"):
            row = tuple(number(line.get(key)) for key in ("bytes", "step", "seconds"))
            rows.add((row[0] or 0.0, row[1] or 0.0, row[2] or 0.0))
        bytes, steps, seconds = zip(*sorted(rows), strict=True)
        return cls(bytes, steps, seconds)

    def at(self, bytes: float) -> tuple[int, float]:
        """The step and the seconds, interpolated between lines."""
        after = min(max(bisect.bisect_left(self.bytes, bytes), 1), len(self.bytes) - 1)
        if after < 1:
            return 0, 0.0
        low, high = self.bytes[after - 1], self.bytes[after]
        share = min(1.0, max(0.0, (bytes - low) / (high - low))) if high > low else 1.0
        step, second = (
            values[after - 1] + share * (values[after] - values[after - 1]) for values in (self.steps, self.seconds)
        )
        return round(step), second


@dataclass(frozen=True)
class Mark:
    """An event after so many processed bytes: a step "skipped", a training "resumed"."""

    bytes: float
    kind: str
    words: str


def marks(metrics: Metrics) -> list[Mark]:
    """Skipped steps and resumptions."""
    found: list[Mark] = []
    for line in of_kind(metrics, "skipped", "resumed"):
        at, step = number(line.get("bytes")), number(line.get("step"))
        if at is not None and step is not None:
            kind = str(line["kind"])
            reason = line.get("reason") or f"loss {line.get('nats')}, gradient norm {line.get('grad_norm')}"
            words = f"step {step:,.0f} ({reason})" if kind == "skipped" else f"from step {step:,.0f}"
            found.append(Mark(at, kind, words))
    return found


def phases(metrics: Metrics) -> dict[str, float]:
    """Seconds by phase over all sessions, in order; training steps are one phase."""
    before: dict[str, float] = {}
    later: dict[str, float] = {}
    for line in of_kind(metrics, "phase"):
        name, seconds = line.get("name"), number(line.get("duration"))
        if isinstance(name, str) and seconds is not None:
            kept = later if line.get("step") or name in ("validation", "saving") else before
            kept[name] = kept.get(name, 0.0) + seconds
    steps = max((number(line.get("seconds")) or 0.0 for line in of_kind(metrics, "train", "validation")), default=0.0)
    return {**before, **({"steps": steps} if steps and (before or later) else {}), **later}


def memory(metrics: Metrics) -> dict[str, float]:
    """Peak memory in bytes: "baseline" before the first step, "peak", and "predicted" for a step."""
    found: dict[str, float] = {}
    for line in of_kind(metrics, "memory"):
        for key in ("baseline", "predicted", "peak"):
            value = number(line.get(key))
            if value:
                found[key] = max(found.get(key, 0.0), value)
    return found


def intervals(metrics: Metrics, most: int) -> list[tuple[float, float, Counter[int]]]:
    """(first byte, last byte, patches of each length) of about equal intervals of the training."""
    lines = [line for line in of_kind(metrics, "train") if isinstance(line.get("patch_lengths"), list)]
    end = max((number(line.get("bytes")) or 0.0 for line in lines), default=0.0)
    found: list[tuple[float, float, Counter[int]]] = []
    counts, begun, last = Counter[int](), 0.0, 0.0
    for line in lines:
        at = number(line.get("bytes")) or 0.0
        counts.update(dict(_lengths(line)))
        if at >= last + end / most or at >= end:
            if counts and at > begun:
                found.append((begun, at, counts))
            counts, begun, last = Counter[int](), at, at
    return found


def _lengths(line: Mapping[str, object]) -> Iterator[tuple[int, int]]:
    counts = line["patch_lengths"]
    assert isinstance(counts, list)
    for length, count in enumerate(counts, 1):  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(count, int) and count > 0:
            yield length, count


def last_session(metrics: Metrics) -> Mapping[str, object]:
    """The session_start line of the newest session; may be empty."""
    found = of_kind(metrics, "session_start")
    return found[-1] if found else {}
