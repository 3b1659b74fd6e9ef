"""What a tokenizer does not give back of a text: the edits that turn what tokens decode to into the text again.

    text       "The café\\r\\n"       decoded     "the cafe\\n"
    edits      0 "t"→"T"   6 "e"→"é"   0 ""→"\\r"         each after so many characters that are the same
    coded      Elias gamma codes of these three counts plus 1, and 8 bits for each byte of UTF-8 that is put in

Tokens and edits together are a code of the text, whatever the tokenizer loses; tokens alone are one only where there
are no edits. The edits are those of a simple search, so that the bits of both are an upper bound.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

SEARCHED = (16, 4), (64, 8), (4096, 8)
"""How far the search goes, and how many characters must agree where both resume; ALIKE after as many of both."""
ALIKE = 3
_END = "\U0010ffff" * 8  # a noncharacter: where one text ends the other one does


@dataclass(frozen=True)
class Edit:
    """After `gap` characters that are the same, `removed` of the decoded text stands for `inserted` of the original."""

    gap: int
    removed: str
    inserted: str
    first: bool = False
    """Whether it is the beginning of the text."""

    @property
    def bits(self) -> int:
        """What it costs: see above."""
        return gamma(self.gap) + gamma(len(self.removed)) + gamma(size(self.inserted)) + 8 * size(self.inserted)


def size(text: str) -> int:
    """Bytes of a text; a lone surrogate stands for a byte that is not UTF-8."""
    return len(text.encode(errors="surrogateescape"))


def gamma(count: int) -> int:
    """Bits of the Elias gamma code of `count` + 1 (Elias 1975)."""
    return 2 * (count + 1).bit_length() - 1


def cost(edits: Iterable[Edit]) -> int:
    """Bits of the edits of a document: their number, and each of them. One bit if there are none."""
    edits = list(edits)
    return gamma(len(edits)) + sum(edit.bits for edit in edits)


def edits_of(decoded: str, text: str) -> list[Edit]:
    """Edits that make `text` of `decoded`: none if the two are equal."""
    found: list[Edit] = []
    here = there = 0
    padded, wanted = decoded + _END, text + _END
    while True:
        gap = common(decoded, here, text, there)
        here, there = here + gap, there + gap
        if here == len(decoded) and there == len(text):
            return found
        out, into = resumed(padded, here, wanted, there)
        found.append(Edit(gap, decoded[here : here + out], text[there : there + into], not there))
        here, there = min(here + out, len(decoded)), min(there + into, len(text))


def repaired(decoded: str, edits: Iterable[Edit]) -> str:
    """The text: the inverse of `edits_of`."""
    parts: list[str] = []
    at = 0
    for edit in edits:
        parts += [decoded[at : at + edit.gap], edit.inserted]
        at += edit.gap + len(edit.removed)
    return "".join([*parts, decoded[at:]])


def common(one: str, here: int, other: str, there: int) -> int:
    """How many characters from two places on are the same."""
    most = min(len(one) - here, len(other) - there)
    found, step = 0, 64
    while found < most and one[here + found : here + found + step] == other[there + found : there + found + step]:
        found, step = min(found + step, most), 2 * step
    while step := step // 2:
        if found + step <= most and one[here + found : here + found + step] == other[there + found :][:step]:
            found += step
    return found


def resumed(decoded: str, here: int, text: str, there: int) -> tuple[int, int]:
    """The least (removed, inserted) after which the two are the same again; all that was searched if they are not."""
    for far, same in SEARCHED:
        best = next(
            (
                (many, many)
                for many in range(1, far)
                if decoded[here + many : here + many + ALIKE] == text[there + many : there + many + ALIKE]
            ),
            (far, far),
        )
        for into in range(far):
            room = sum(best) - into  # to be better it must be found before
            wanted = text[there + into : there + into + same]
            if room < 1 or len(wanted) < same:
                break
            out = decoded.find(wanted, here, here + min(room - 1, far) + same)
            if out >= 0:
                best = out - here, into
        if sum(best) < 2 * far:
            return best
    return SEARCHED[-1][0], SEARCHED[-1][0]


# --- what kind of loss it is --------------------------------------------------------------------------------------


def without_accents(text: str) -> str:
    """The text without combining marks."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


CHANGES: dict[str, Callable[[str], str]] = {
    "line ends": lambda text: text.replace("\r", ""),
    "Unicode normalization": lambda text: unicodedata.normalize("NFKC", text),
    "accents": without_accents,
    "case": str.lower,
    "white space": lambda text: "".join(text.split()),
}
"""What, done to both, makes what was decoded and what it stands for the same."""


def kind_of(edit: Edit, unknown: str | None = None) -> str:
    """What was lost, in words. `unknown`: the text of the tokenizer's unknown token."""
    if unknown and unknown in edit.removed:
        return "unknown tokens"
    if edit.inserted == "\ufeff" and not edit.removed:
        return "byte order mark"
    if edit.first and edit.removed == " " and not edit.inserted:
        return "leading space"
    return next(explained(edit), "other characters" if edit.removed else "dropped characters")


def explained(edit: Edit) -> Iterator[str]:
    """The sets of changes that make the two sides the same, smallest first."""
    for many in range(1, len(CHANGES) + 1):
        for names in itertools.combinations(CHANGES, many):
            sides = edit.removed, edit.inserted
            for name in names:
                sides = CHANGES[name](sides[0]), CHANGES[name](sides[1])
            if sides[0] == sides[1]:
                yield " and ".join(names)
