"""A noisy context: what clean bytes cost after a prompt with typing errors, odd case, or characters that look alike.

The first five are those on which the BLT paper (arXiv:2412.09871, section 6.1) evaluates HellaSwag: AntSpeak, drops,
random case, repeats, upper case. Here noise is in the prefix alone; the continuation is what is scored, the same bytes
after the noisy prefix and after the original one. Where a perturbation has a strength, it is the share that is changed
of the characters that it applies to; those changed at one strength are changed at every higher one too.

Bytes that are not UTF-8 stay as they are. A prefix that a perturbation leaves as it was makes no item: there may be
nothing to decompose, or no case to change.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from bytelm.evaluate.published import texts
from bytelm.evaluate.robustness.base import Item, Query, Sources, character, generator

PREFIX, TARGET = 384, 96  # bytes of the context before noise, and of what is scored
STRENGTHS = (2, 5, 10, 20)  # per cent
TITLE = "bits per byte lost on clean text after a noisy context"
NEEDS = f"texts of at least {(PREFIX + TARGET) // 2} bytes"
MEAN = "bits/byte lost, mean at {} %"  # a further figure, of each strength
HEADLINE = MEAN.format(10)

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHIFT = (0.0, 0.25, 0.75)  # of each row of keys, in keys
LATIN, ALIKE = "aceijopsxyABCEHIJKMOPSTXY", "асеіјорѕхуАВСЕНІЈКМОРЅТХУ"
ZERO_WIDTH = "\N{ZERO WIDTH SPACE}"

Change = Callable[[str, np.random.Generator], str]
"""A character and random numbers → what stands in its place."""


def neighbours() -> dict[str, str]:
    """The keys around each letter's key on a QWERTY keyboard, of the same case."""
    places = {key: (row, column + SHIFT[row]) for row, keys in enumerate(KEYS) for column, key in enumerate(keys)}
    found = {
        key: "".join(o for o, (r, c) in places.items() if o != key and abs(r - row) <= 1 and abs(c - column) <= 1)
        for key, (row, column) in places.items()
    }
    return found | {key.upper(): near.upper() for key, near in found.items()}


NEAR = neighbours()
HOMOGLYPHS = dict(zip(LATIN, ALIKE, strict=True))


def whole(text: str, random: np.random.Generator) -> Iterator[tuple[str, str]]:
    """(row, noisy text) of the perturbations that have no strength."""
    yield "spaced upper case (AntSpeak)", " ".join(text.upper())
    yield "upper case", text.upper()
    flips = random.random(len(text)) < 0.5
    yield "random case", "".join(c.upper() if up else c.lower() for c, up in zip(text, flips.tolist(), strict=True))
    yield "decomposed (NFD)", unicodedata.normalize("NFD", text)
    yield "no spaces", text.replace(" ", "")


GRADED: Mapping[str, tuple[Callable[[str], bool], Change]] = {
    "drops": (lambda c: True, lambda c, random: ""),
    "repeats": (lambda c: True, lambda c, random: c * int(random.integers(2, 5))),
    "keyboard neighbours": (NEAR.__contains__, lambda c, random: NEAR[c][int(random.integers(len(NEAR[c])))]),
    "homoglyphs": (HOMOGLYPHS.__contains__, lambda c, random: HOMOGLYPHS[c]),
    "zero-width": (lambda c: True, lambda c, random: c + ZERO_WIDTH),
    "removed spaces": (" ".__eq__, lambda c, random: ""),
}
"""Which characters a perturbation applies to, and what it makes of one."""


def graded(text: str, name: str, strength: int, random: np.random.Generator) -> str:
    """The text with `strength` per cent of the characters changed that can be, at least one of them."""
    applies, change = GRADED[name]
    places = [i for i, c in enumerate(text) if applies(c) and not "\udc80" <= c <= "\udcff"]
    chosen = random.permutation(len(places))[: max(1, round(len(places) * strength / 100))]
    changed = list(text)
    for place in (places[index] for index in chosen.tolist()):
        changed[place] = change(text[place], random)
    return "".join(changed)


def noisy(text: str, seed: int, number: int) -> Iterator[tuple[str, str]]:
    """(row, noisy text) of every perturbation at every strength."""
    yield from whole(text, generator(seed, "noise", number))
    for name in GRADED:
        for strength in STRENGTHS:
            yield f"{name} {strength} %", graded(text, name, strength, generator(seed, "noise", name, number))


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Excerpts of the documents, their beginnings in every kind of noise."""
    for number, (unit, data) in enumerate(texts(sources).excerpts(PREFIX + TARGET, amount, seed)):
        end = character(data, len(data) - TARGET)
        prefix, target = data[:end], data[end:]
        if not prefix or not target:
            continue
        text = prefix.decode(errors="surrogateescape")
        for row, found in noisy(text, seed, number):
            if (changed := found.encode(errors="surrogateescape")) != prefix:
                yield Item(row, unit, "difference", (Query(changed, target), Query(prefix, target)))


def summary(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over perturbations at each strength that all have."""
    found: dict[str, float] = {}
    for strength in STRENGTHS:
        own = [figures["difference"] for row, figures in rows.items() if row.endswith(f" {strength} %")]
        if own:
            found[MEAN.format(strength)] = sum(own) / len(own)
    return found


def curves(rows: Sequence[str]) -> dict[str, list[tuple[float, str]]]:
    """{perturbation: (strength, row)} of the rows that have a strength."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if graded_row := re.fullmatch(r"(.+) (\d+) %", row):
            found.setdefault(graded_row[1], []).append((float(graded_row[2]), row))
    return found
