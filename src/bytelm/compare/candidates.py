"""The models that are compared, each in every size: a name, and a shape for whatever a byte may cost.

    blt:5             BLT, patches cut where the next byte is hard to predict, of 5 bytes on average
    blt-no-ngrams:5   the same without its tables of n-grams
    space             BLT, patches cut at spaces
    megabyte:8        MEGABYTE, patches of 8 bytes
    byte              byte Transformer
    byte-window:128   byte Transformer that sees 128 bytes
    perceiver:256     PerceiverAR, blocks of 256 latents
    linear            linear Transformer
    bpe:4096          Transformer over tokens, 4096 ids in its vocabulary

The numbers are those that hold where none is given. Each architecture says its own in `sizes.py`; one that has none,
such as somebody else's, is compared in the one size of its Config, under its own name.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from bytelm import find
from bytelm.errors import UsageError
from bytelm.find import unknown
from bytelm.interfaces.sizes import Family, Table, usual

WIDTHS = range(32, 4097, 16)
DEPTH_OFFSETS = (0, -1, 1, -2, 2)  # layers more or less than usual
DEPTH_PENALTY = 0.02  # what the square of one layer more or less weighs, as the logarithm of a cost missed


DEFAULT = "blt,megabyte,space,byte,byte-window,perceiver,linear,bpe:4096"


@dataclass(frozen=True)
class Candidate:
    """A family and its number, as they were named."""

    name: str
    family: Family
    number: int

    @property
    def tokens(self) -> bool:
        """Whether it reads tokens."""
        return self.family.tokens

    def tables(self, width: int, depth_offset: int) -> Table:
        """The tables of a run of this size: what the model is made of, and what differs in how it learns."""
        found, rate = self.family.tables(self.number), self.family.rate
        train = ({} if rate is None else {"learning_rate": rate * (128 / width) ** 0.5}) | found.get("train", {})
        return {**found, "model": self.family.shape(width, depth_offset, self.number), "train": train}


def families() -> dict[str, Family]:
    """All that can be compared, by name: what architectures say of their sizes; others in the one that they have."""
    found: dict[str, Family] = {}
    for name in find.names("models"):
        sizes = find.part(name, "sizes")
        found |= {name: of_one_size(name)} if sizes is None else sizes.FAMILIES
    return found


def of_one_size(name: str) -> Family:
    """An architecture that says nothing of its sizes: that of its Config, on space patches where it reads patches."""
    patching = {"patching": {"name": "space"}}
    return Family(
        lambda width, depth_offset, number: {"name": name},
        tables=lambda number: patching if find.find("models", name).Config.patched else {},
    )


def candidates(names: str) -> list[Candidate]:
    """The models that a text such as "blt,bpe:4096" names. Raises UsageError for others, or the same one twice."""
    found = [candidate(name.strip()) for name in names.split(",")]
    seen: set[tuple[str, int]] = set()
    for one in found:
        if (key := (one.name.partition(":")[0], one.number)) in seen:
            raise UsageError(f"--models names {one.name} twice: once is enough")
        seen.add(key)
    return found


def candidate(text: str) -> Candidate:
    """One model by its name. Raises UsageError."""
    name, colon, number = text.partition(":")
    known = families()
    if name not in known:
        raise UsageError(unknown("model", name, list(known)))
    family = known[name]
    if not colon:
        return Candidate(text, family, family.number)
    if not family.number:
        raise UsageError(f"{text}: {name} takes no number")
    if not number.isdecimal() or int(number) < family.least:
        raise UsageError(f"{text}: the number of {name} must be a whole one from {family.least} up")
    return Candidate(text, family, int(number))


def nearest(cost: Callable[[int, int], float], goal: float) -> tuple[int, int]:
    """The width and oddness whose cost is nearest to `goal`; costs rise with the width."""

    def apart(size: tuple[int, int]) -> float:
        found = cost(*size)
        return abs(math.log(found / goal)) + DEPTH_PENALTY * size[1] ** 2

    index = bisect.bisect_left(WIDTHS, goal, key=lambda width: cost(width, 0))
    near = WIDTHS[max(0, index - 2) : index + 2]
    return min(
        ((width, depth_offset) for width in near for depth_offset in DEPTH_OFFSETS if usual(width) + depth_offset > 1),
        key=apart,
    )
