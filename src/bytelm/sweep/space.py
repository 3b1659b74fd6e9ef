"""What a sweep varies: keys of a configuration, with values or a range each, and the trials drawn from them.

train.learning_rate=1e-3,2e-3,4e-3     these values
train.learning_rate=1e-4..1e-2         any number between, log-uniform where the low end is above 0, else uniform
model.global_layers=2..6               integers, if both ends are
"""

from __future__ import annotations

import itertools
import math
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from bytelm.config import assignments
from bytelm.errors import UsageError

FIXED = ("data", "modality", "mix", "init_from", "parallel")
"""Tables and keys that all trials share: the data is packed once."""
OF_THE_SWEEP = {"train.seed": "--seeds", "train.device": "--device"}
"""Keys that an option sets for all trials."""
MOST = 10_000  # trials

Trial = Mapping[str, Any]
"""{key: value} of one trial."""


@dataclass(frozen=True)
class Values:
    """A key with these values."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A key with any value from `low` to `high`."""

    key: str
    low: float
    high: float
    whole: bool

    def draw(self, at: random.Random) -> float:
        """One value; integers are as likely as their share of the range."""
        low, high = (self.low, self.high + 1) if self.whole else (self.low, self.high)
        log = self.low > 0
        value = math.exp(at.uniform(math.log(low), math.log(high))) if log else at.uniform(low, high)
        return min(math.floor(value), int(self.high)) if self.whole else float(f"{value:.3g}")


Axis = Values | Range


def axis(text: str) -> Axis:
    """What an argument of --over says. Raises UsageError."""
    key, equals, told = (part.strip() for part in text.partition("="))
    if not equals or not key or not told:
        raise UsageError(f"--over {text}: write key=value,value or key=low..high, as in train.learning_rate=1e-3..1e-2")
    if (table := key.partition(".")[0]) in FIXED:
        raise UsageError(f"--over {key}: all trials share {table}: use --set {key}=..., or one sweep for each")
    if key in OF_THE_SWEEP:
        raise UsageError(f"--over {key}: use {OF_THE_SWEEP[key]}")
    low, dots, high = told.partition("..")
    return spread(key, low, high) if dots else Values(key, values(key, told))


def spread(key: str, low: str, high: str) -> Range:
    """A range from its two ends. Raises UsageError."""
    try:
        first, last, whole = float(int(low)), float(int(high)), True
    except ValueError:
        try:
            first, last, whole = float(low), float(high), False
        except ValueError:
            raise UsageError(f"--over {key}={low}..{high}: both ends of a range must be numbers") from None
    if not -math.inf < first < last < math.inf:
        raise UsageError(f"--over {key}={low}..{high}: the low end must be below the high end, and both finite")
    return Range(key, first, last, whole)


def values(key: str, told: str) -> tuple[Any, ...]:
    """Comma-separated TOML values; words need no quotes. Raises UsageError for duplicates."""
    try:
        parsed = tomllib.loads(f"value = [{told}]")
        found = parsed["value"] if len(parsed) == 1 else None
    except (ValueError, RecursionError):
        found = None
    if found is None:
        found = [merged(key, one.strip()) for one in told.split(",")]
    if len({repr(value) for value in found}) < len(found):
        raise UsageError(f"--over {key}={told}: names a value twice")
    return tuple(found)


def merged(key: str, text: str) -> Any:
    """A value as `--set` reads it."""
    value: Any = assignments([f"{key}={text}"], "--over")
    for part in key.split("."):
        value = value[part]
    return value


def axes(texts: Sequence[str]) -> list[Axis]:
    """All that a sweep varies. Raises UsageError for none, and for a key that is there twice."""
    if not texts:
        raise UsageError("nothing to vary: give --over key=value,value, as in --over train.learning_rate=1e-3,2e-3")
    found = [axis(text) for text in texts]
    keys = [one.key for one in found]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"--over {key}: is there twice: give all of its values at once")
    return found


def grid(found: Sequence[Axis]) -> list[Trial]:
    """Every combination; the last key changes fastest. Raises UsageError for ranges, and for too many."""
    lists: list[tuple[Any, ...]] = []
    for one in found:
        if isinstance(one, Range):
            raise UsageError(f"--over {one.key}={one.low:g}..{one.high:g}: a range needs --search random or halving")
        lists.append(one.values)
    if (count := math.prod(map(len, lists))) > MOST:
        raise UsageError(f"--over: {count:,} combinations are more than {MOST:,}: use --search random --trials N")
    keys = [one.key for one in found]
    return [dict(zip(keys, each, strict=True)) for each in itertools.product(*lists)]


def drawn(found: Sequence[Axis], count: int) -> list[Trial]:
    """`count` different trials at random: the first ones are the same, whatever the count.

    Fewer where there are no more.
    """
    at, trials, seen = random.Random(0), list[Trial](), set[str]()
    for _ in range(100 * count):
        trial = {one.key: at.choice(one.values) if isinstance(one, Values) else one.draw(at) for one in found}
        if (said := repr(trial)) not in seen:
            seen.add(said)
            trials.append(trial)
        if len(trials) == count:
            break
    return trials


def told(value: Any) -> str:
    """A value as `--set` reads it."""
    return tomli_w.dumps({"value": value}).partition("=")[2].strip().replace("\n", " ")


def show(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
