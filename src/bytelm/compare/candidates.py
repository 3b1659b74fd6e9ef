"""The candidates of a comparison, each available in every size.

    blt:5             BLT, entropy patches, target mean length 5 bytes
    blt-no-ngrams:5   the same without n-gram tables
    space             BLT, space patches
    megabyte:8        MEGABYTE, patches of 8 bytes
    megabyte-across:8 the same with a byte stage across patches, and n-gram tables
    byte              byte Transformer
    byte-window:128   byte Transformer, attention window of 128 bytes
    byte-window-ngrams:128  the same with n-gram tables
    perceiver:256     PerceiverAR, blocks of 256 latents
    linear            linear Transformer
    bpe:4096          Transformer over tokens, vocabulary of 4096
    bpe-ngrams:4096   the same with tables of n-grams of tokens

    blt@60            BLT of a size for 60 training bytes per parameter

    hf:FOLDER         a causal model of transformers, which is not trained (`foreign.py`)

The numbers are the defaults; without one after "@", sizes are for `plan.RATIO` training bytes per parameter. Each
architecture defines its candidates in `sizes.py`; one without that file (a plugin) is compared in the one size of its
Config, under its own name.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from bytelm import find
from bytelm.data.names import after_prefix
from bytelm.errors import UsageError
from bytelm.find import unknown
from bytelm.interfaces.sizes import Family, Table, usual

WIDTHS = range(32, 4097, 16)
DEPTH_OFFSETS = (0, -1, 1, -2, 2)  # from the usual number of layers
DEPTH_PENALTY = 0.02  # per squared depth offset, in units of |log(cost / goal)|


_BYTES = "blt,megabyte,megabyte-across,space,hnet,byte,byte-window,byte-window-ngrams,perceiver,linear"
DEFAULT = f"{_BYTES},bpe:4096,bpe-ngrams:4096"


@dataclass(frozen=True)
class Candidate:
    """A family and its number."""

    name: str
    family: Family
    number: int
    ratio: float | None = None
    """Training bytes per non-embedding parameter; None for the usual number."""

    @property
    def without_ratio(self) -> str:
        """Its name without the ratio: what has the same tokens and patches."""
        return self.name.partition("@")[0]

    @property
    def family_name(self) -> str:
        """The name of its family."""
        return self.without_ratio.partition(":")[0]

    @property
    def tokenizer(self) -> str:
        """The name of its tokens, which families share."""
        return f"bpe-{self.number}"

    @property
    def tokens(self) -> bool:
        """Whether it reads tokens."""
        return self.family.tokens

    def tables(self, width: int, depth_offset: int, bytes: float = 0.0) -> Table:
        """The configuration tables of a run of this size on so many bytes: the recipe, and training settings that
        differ.
        """
        family = self.family
        found, rate = family.tables(self.number), family.rate
        model = family.shape(width, depth_offset, self.number) | family.grown(bytes)
        train = ({} if rate is None else {"learning_rate": rate * (128 / width) ** 0.5}) | found.get("train", {})
        return {**found, "model": model, "train": train}


def families() -> dict[str, Family]:
    """All families by name: those of the architectures' `sizes.py`; other architectures in their one size."""
    found: dict[str, Family] = {}
    for name in find.names("models"):
        sizes = find.part(name, "sizes")
        found |= {name: of_one_size(name)} if sizes is None else sizes.FAMILIES
    return found


def of_one_size(name: str) -> Family:
    """The family of an architecture without `sizes.py`: its default Config, on space patches if it is patched."""
    patching = {"patching": {"name": "space"}}
    return Family(
        lambda width, depth_offset, number: {"name": name},
        tables=lambda number: patching if find.find("models", name).Config.patched else {},
    )


def listed(names: str) -> tuple[list[str], list[str]]:
    """A list such as "blt,hf:folder" in two: the models to train, and those of transformers."""
    found = [name.strip() for name in names.split(",")]
    theirs = [name for name in found if after_prefix(name) is not None]
    return [name for name in found if name not in theirs], theirs


def candidates(names: str) -> list[Candidate]:
    """The models to train of a list such as "blt,bpe:4096". Raises UsageError for unknown names and duplicates."""
    found = [candidate(name) for name in listed(names)[0]]
    seen: set[tuple[str, int, float | None]] = set()
    for one in found:
        if (key := (one.family_name, one.number, one.ratio)) in seen:
            raise UsageError(f"--models names {one.name} twice")
        seen.add(key)
    return found


def candidate(text: str) -> Candidate:
    """One model by its name. Raises UsageError."""
    sized, at, ratio = text.partition("@")
    name, colon, number = sized.partition(":")
    known = families()
    if name not in known:
        raise UsageError(unknown("model", name, list(known)))
    family = known[name]
    if at and not (decimal(ratio) and float(ratio) >= 1):
        raise UsageError(f"{text}: after @ give training bytes per parameter, a number from 1 on, as in {sized}@60")
    if not colon:
        return Candidate(text, family, family.number, float(ratio) if at else None)
    if not family.number:
        raise UsageError(f"{text}: {name} takes no number")
    if not number.isdecimal() or int(number) < family.least:
        raise UsageError(f"{text}: the number of {name} must be an integer, at least {family.least}")
    return Candidate(text, family, int(number), float(ratio) if at else None)


def decimal(text: str) -> bool:
    """Whether a text is a decimal number without a sign or an exponent."""
    return text.replace(".", "", 1).isdecimal()


def nearest(cost: Callable[[int, int], float], goal: float) -> tuple[int, int]:
    """The width and depth offset whose cost is nearest to `goal`; costs increase with the width."""

    def apart(size: tuple[int, int]) -> float:
        found = cost(*size)
        return abs(math.log(found / goal)) + DEPTH_PENALTY * size[1] ** 2

    index = bisect.bisect_left(WIDTHS, goal, key=lambda width: cost(width, 0))
    near = WIDTHS[max(0, index - 2) : index + 2]
    return min(
        ((width, depth_offset) for width in near for depth_offset in DEPTH_OFFSETS if usual(width) + depth_offset > 1),
        key=apart,
    )
