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

The numbers are those that hold where none is given.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bytelm.errors import UsageError
from bytelm.find import unknown
from bytelm.units import VOCAB

HEADS = (32, 48, 16)  # widths of a head, the first that divides the width; kernels want multiples of 16
WIDE, WIDE_HEADS = 512, (64, *HEADS)  # from this width on: what kernels of GPUs are made for
WIDTHS = range(32, 4097, 16)
ODD = (0, -1, 1, -2, 2)  # layers more or less than usual
ODDNESS = 0.02  # what the square of one layer more or less weighs, as the logarithm of a cost missed

Table = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A kind of model. `shape(width, odd, number)` is its table [model]: as wide as `width` where it works on bytes,
    `odd` layers deeper than usual. `rate`: its learning rate at width 128; at others the inverse root of the width.
    """

    shape: Callable[[int, int, int], Table]
    rate: float
    number: int = 0
    """What may follow the name, where something may; this is what it is otherwise."""
    least: int = 1
    tables: Callable[[int], Table] = field(default=lambda number: {})
    """The other tables of a run."""


def usual(width: int) -> int:
    """Layers that go with a width."""
    return 2 + width // 64


def heads(width: int) -> int:
    """Heads of a width."""
    return width // next(head for head in (WIDE_HEADS if width >= WIDE else HEADS) if width % head == 0)


def transformer(width: int, odd: int, **more: Any) -> Table:
    """The Transformer over bytes, all of them or those in a window, or over tokens."""
    return {"name": "transformer", "layers": usual(width) + odd, "dim": width, "heads": heads(width), **more}


def linear(width: int, odd: int, number: int) -> Table:
    """The linear Transformer."""
    # Turned faster than usual: without a softmax, places have to differ more for a byte to find its neighbours.
    return {"name": "linear", "layers": usual(width) + odd, "dim": width, "heads": heads(width), "theta": 30.0}


def perceiver(width: int, odd: int, number: int) -> Table:
    """PerceiverAR."""
    layers = usual(width) + odd - 1  # one more of them is the cross-attention
    return {"name": "perceiver", "latents": number, "layers": layers, "dim": width, "heads": heads(width)}


def megabyte(width: int, odd: int, number: int) -> Table:
    """MEGABYTE: the global model twice as wide as the local one."""
    dims, layers = [2 * width, width], [usual(width), usual(width) + odd]
    table = {"name": "megabyte", "sizes": [number], "dims": dims, "layers": layers, "reach": number}
    return {**table, "heads": [heads(dim) for dim in dims]}


def blt(width: int, odd: int, number: int) -> Table:
    """BLT: a shallow encoder, a deeper decoder, and twice their width between them."""
    local = {"local_dim": width, "local_heads": heads(width), "cross_heads": heads(width), "window": 128, "queries": 2}
    latent = {"global_dim": 2 * width, "global_heads": heads(2 * width), "global_layers": usual(width)}
    return {
        "name": "blt",
        "encoder_layers": 1,
        "decoder_layers": usual(width) + odd - 1,
        **local,
        **latent,
        "ngram_rows": 8192,
    }


def entropy_patches(size: int) -> Table:
    """The other tables of BLT."""
    patching = {"name": "entropy", "mean_size": float(size)}
    return {"patching": patching, "scorer": {"name": "ngram"}, "train": {"embedding_rate": 3.0}}


def space_patches(_: int) -> Table:
    """The other tables of BLT on space patches."""
    return {"patching": {"name": "space"}, "train": {"embedding_rate": 3.0}}


def without_ngrams(width: int, odd: int, number: int) -> Table:
    """BLT whose bytes are embedded alone."""
    return {**blt(width, odd, number), "ngram_sizes": []}


FAMILIES = {
    "blt": Family(blt, rate=9e-3, number=5, least=2, tables=entropy_patches),
    "blt-no-ngrams": Family(without_ngrams, rate=9e-3, number=5, least=2, tables=entropy_patches),
    "space": Family(blt, rate=9e-3, tables=space_patches),
    "megabyte": Family(megabyte, rate=6e-3, number=8, least=2),
    "byte": Family(lambda width, odd, _: transformer(width, odd), rate=8e-3),
    "byte-window": Family(lambda width, odd, window: transformer(width, odd, window=window), rate=8e-3, number=128),
    "perceiver": Family(perceiver, rate=8e-3, number=256),
    "linear": Family(linear, rate=8e-3),
    "bpe": Family(
        lambda width, odd, ids: transformer(width, odd, vocabulary=ids), rate=8e-3, number=4096, least=VOCAB + 1
    ),
}
DEFAULT = "blt,megabyte,space,byte,byte-window,perceiver,linear,bpe:4096"


@dataclass(frozen=True)
class Entrant:
    """A family and its number, as they were named."""

    name: str
    family: Family
    number: int

    @property
    def tokens(self) -> bool:
        """Whether it reads tokens."""
        return self.name.startswith("bpe")

    def tables(self, width: int, odd: int) -> Table:
        """The tables of a run of this size: what the model is made of, and what differs in how it learns."""
        found = self.family.tables(self.number)
        train = {"learning_rate": self.family.rate * (128 / width) ** 0.5, **found.get("train", {})}
        return {**found, "model": self.family.shape(width, odd, self.number), "train": train}


def entrants(names: str) -> list[Entrant]:
    """The models that a text such as "blt,bpe:4096" names. Raises UsageError for others, or the same one twice."""
    found = [entrant(name.strip()) for name in names.split(",")]
    seen: set[tuple[int, int]] = set()
    for one in found:
        if (id(one.family), one.number) in seen:
            raise UsageError(f"--models names {one.name} twice: once is enough")
        seen.add((id(one.family), one.number))
    return found


def entrant(text: str) -> Entrant:
    """One model by its name. Raises UsageError."""
    name, colon, number = text.partition(":")
    if name not in FAMILIES:
        raise UsageError(unknown("model", name, list(FAMILIES)))
    family = FAMILIES[name]
    if not colon:
        return Entrant(text, family, family.number)
    if not family.number:
        raise UsageError(f"{text}: {name} takes no number")
    if not number.isdecimal() or int(number) < family.least:
        raise UsageError(f"{text}: the number of {name} must be a whole one from {family.least} up")
    return Entrant(text, family, int(number))


def nearest(cost: Callable[[int, int], float], goal: float) -> tuple[int, int]:
    """The width and oddness whose cost is nearest to `goal`; costs rise with the width."""

    def apart(size: tuple[int, int]) -> float:
        found = cost(*size)
        return abs(math.log(found / goal)) + ODDNESS * size[1] ** 2

    index = bisect.bisect_left(WIDTHS, goal, key=lambda width: cost(width, 0))
    near = WIDTHS[max(0, index - 2) : index + 2]
    return min(((width, odd) for width in near for odd in ODD if usual(width) + odd > 1), key=apart)
