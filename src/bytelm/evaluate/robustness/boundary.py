"""A document cut in two at every kind of place: what the rest costs after a prompt that ends there, against uncut.

A user's prompt ends anywhere. For a model over bytes that makes no difference, by the chain rule: log p(prefix) +
log p(rest | prefix) is log p(prefix rest), and this suite is 0 to rounding. A tokenizer encodes prompt and rest apart,
which is another sequence of tokens than that of the whole, and one that the model was hardly ever trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bytelm.evaluate.published import texts
from bytelm.evaluate.robustness.base import Item, Sources, cut, generator

PREFIX, REST = 256, 64  # bytes before the cut, about, and after it
SEARCHED = 16  # excerpts for each item of a row
TITLE = "bits per byte that cutting a text into prompt and continuation costs"
NEEDS = f"texts of at least {(PREFIX + REST) // 2} bytes"

PLACES: dict[str, Callable[[str, str], bool]] = {
    "before a space": lambda before, after: after == " " and not before.isspace(),
    "after a space": lambda before, after: before == " " and not after.isspace(),
    "in a word": lambda before, after: before.isalpha() and after.isalpha(),
    "in a number": lambda before, after: before.isdecimal() and after.isdecimal(),
}
"""Whether a place is of a kind, from the characters before and after it."""
INSIDE = "inside a character"


def places(data: bytes) -> dict[str, list[int]]:
    """The places of each kind in a text, as offsets in bytes. Bytes that are not UTF-8 are no characters."""
    found: dict[str, list[int]] = {name: [] for name in (*PLACES, INSIDE)}
    text = data.decode(errors="surrogateescape")
    offset, before = 0, ""
    for after in text:
        for name, holds in PLACES.items():
            if before and holds(before, after):
                found[name].append(offset)
        size = len(after.encode(errors="surrogateescape"))
        found[INSIDE] += range(offset + 1, offset + size)
        offset, before = offset + size, after
    return found


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Excerpts, each cut at a place of the row's kind far enough from its ends.

    Excerpts are more than `amount`, as numbers are rare.
    """
    found: dict[str, list[Item]] = {}
    for number, (unit, data) in enumerate(texts(sources).excerpts(PREFIX + REST, SEARCHED * amount, seed)):
        for name, offsets in places(data).items():
            fit = [offset for offset in offsets if len(data) // 3 <= offset <= len(data) - REST]
            if fit:
                at = fit[int(generator(seed, "boundary", name, number).integers(len(fit)))]
                found.setdefault(name, []).append(Item(name, unit, "cut", cut(data[:at], data[at : at + REST])))
    for name, own in found.items():
        chosen = generator(seed, "boundary", name).permutation(len(own))[:amount]
        yield from (own[index] for index in chosen.tolist())
