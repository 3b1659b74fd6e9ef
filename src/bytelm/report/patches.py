"""Text split into patches, with next-byte entropies: for the terminal, for a pipe, and as HTML.

Patches alternate between two colours; below them is the next-byte entropy at each byte:

    The| quick| br|own
    ▆▂▁ ▅▂▁▁▁▁ ▄▂ ▅▁▁      one step of a block is one bit
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from bytelm.errors import DataError
from bytelm.report.glyphs import MARKS, character, glyph, pieces
from bytelm.report.markup import rendered
from bytelm.units import LN2

BLOCKS = "▁▂▃▄▅▆▇█"
PATCH_COLOURS = ("#16191d on #a9cbfa", "#16191d on #f6d48f")
BLANK_COLOURS = ("#6b84ab on #a9cbfa", "#a08344 on #f6d48f")
UNBROKEN = 24  # a patch of at most so many pieces stays on one line of the page


@dataclass(frozen=True)
class PatchView:
    """Bytes, and where patches start.

    `opens[i]`: whether byte i starts a patch (byte 0 always does); `entropies[i]`, in nats, is the entropy of the
    prediction of byte i; `threshold`, in nats, is what it is compared with.
    """

    data: bytes
    opens: Sequence[bool]
    entropies: Sequence[float] | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Raises DataError if the fields are inconsistent."""
        size = len(self.data)
        for name, values in (("opens", self.opens), ("entropies", self.entropies)):
            if values is not None and len(values) != size:
                raise DataError(f"a patch view of {size} bytes has {len(values)} {name}: give one for each byte")
        if self.data and not self.opens[0]:
            raise DataError("a patch view has opens[0] False, but byte 0 always starts a patch: set it to True")

    @property
    def starts(self) -> list[int]:
        """Where each patch starts."""
        return [at for at, opens in enumerate(self.opens) if opens]

    @property
    def patches(self) -> list[bytes]:
        """The bytes of each patch, in order."""
        return [self.data[a:b] for a, b in itertools.pairwise([*self.starts, len(self.data)])]

    def bits(self, start: int, count: int) -> list[float]:
        """The entropies of `count` bytes from `start`, in bits; empty if unknown."""
        return [] if self.entropies is None else [nats / LN2 for nats in self.entropies[start : start + count]]

    @property
    def full(self) -> int:
        """The bits at full height of a bar: an integer, at least 4, so that confident predictions have low bars."""
        known = [bits for bits in self.bits(0, len(self.data)) if math.isfinite(bits)]
        return max(4, math.ceil(max(known, default=0.0)), math.ceil((self.threshold or 0.0) / LN2))

    def is_above(self, bits: float) -> bool:
        """Whether an entropy, in bits, is above the threshold."""
        return self.threshold is not None and bits > self.threshold / LN2


def summary(view: PatchView) -> str:
    """One line: how many patches, how long, and the threshold in both units."""
    lengths = [len(patch) for patch in view.patches]
    if not lengths:
        return "no bytes, no patches"
    count, plural = len(lengths), "" if len(lengths) == 1 else "es"
    line = f"{count:,} patch{plural}, mean {len(view.data) / count:.2f} bytes, longest {max(lengths)}"
    if view.threshold is not None:
        line += f"; threshold {view.threshold:.3g} nats = {view.threshold / LN2:.3g} bits"
    return line


def plain(view: PatchView) -> str:
    """The patches without colour, separated by `|`; a `|` of the text is shown as ‹7C›."""
    shown = ["".join(_plain_glyph(piece) for piece in pieces(patch)) for patch in view.patches]
    return "|".join(shown).removesuffix("\n")


def _plain_glyph(piece: bytes) -> str:
    return "‹7C›" if piece == b"|" else glyph(piece) + ("\n" if piece == b"\n" else "")


def terminal(view: PatchView, width: int) -> Text:
    """The patches in alternating colours, in lines of at most `width` columns, the entropy of each byte below.

    A character with more bytes than columns is padded with blanks, so that each byte has a block.
    """
    page, upper, lower = Text(no_wrap=True), Text(), Text()

    def end_line() -> None:
        nonlocal upper, lower
        page.append_text(upper).append("\n")
        if view.entropies is not None:
            page.append_text(lower).append("\n")
        upper, lower = Text(), Text()

    for index, (start, patch) in enumerate(zip(view.starts, view.patches, strict=True)):
        at = start
        for piece in pieces(patch):
            shown = "·" if piece == b" " else glyph(piece)
            bits = view.bits(at, len(piece))
            columns = max(cell_len(shown), len(bits))
            if upper.cell_len and upper.cell_len + columns > width:
                end_line()
            colours = BLANK_COLOURS if piece == b" " else PATCH_COLOURS
            upper.append(set_cell_size(shown, columns), colours[index % 2])
            for nth, value in enumerate(bits):
                share = columns * (nth + 1) // len(bits) - columns * nth // len(bits)
                lower.append(_block(value) * share, "bold" if view.is_above(value) else "dim")
            at += len(piece)
            if piece == b"\n":
                end_line()
    if upper.cell_len:
        end_line()
    page.right_crop(1)
    return page


def _block(bits: float) -> str:
    return BLOCKS[int(_within(bits, len(BLOCKS) - 1))]


def _within(bits: float, most: float) -> float:
    return min(max(bits, 0.0), most) if math.isfinite(bits) else 0.0


def html(view: PatchView, title: str) -> str:
    """A page that shows one view."""
    return rendered("patches.html", title=title, view=drawable(view))


def fragment(view: PatchView, caption: str = "") -> str:
    """The view as a `<figure>` for a page with the stylesheet of `markup.sheet`."""
    return rendered("fragment.html", view=drawable(view, caption)).strip()


def drawable(view: PatchView, caption: str = "") -> dict[str, Any]:
    """The arguments of the `patches` macro."""
    full = view.full
    threshold = None if view.entropies is None or view.threshold is None else _height(view.threshold / LN2, full)
    words = [f"{caption}: {summary(view)}." if caption else f"{summary(view)}."]
    if view.entropies is not None:
        dashed = "; dashed: threshold" if threshold else ""
        words.append(f"Bars: next-byte entropy at each byte, full height {full} bits{dashed}.")
    patches = [list(_cells(view, full, at, patch)) for at, patch in zip(view.starts, view.patches, strict=True)]
    return {"patches": patches, "threshold": threshold, "unbroken": UNBROKEN, "caption": " ".join(words)}


def _cells(view: PatchView, full: int, at: int, patch: bytes) -> Iterator[dict[str, Any]]:
    """Each piece of a patch above the bars of its bytes; the first one shows the patch length."""
    length: int | None = len(patch)
    for piece in pieces(patch):
        bits = view.bits(at, len(piece))
        notes = [f"0x{byte:02X}" for byte in piece]
        if bits:
            notes = [f"{note}, {value:.2f} bits" for note, value in zip(notes, bits, strict=True)]
        kind = "mark" if piece in MARKS else "" if character(piece) is not None else "byte"
        yield {
            "length": length,
            "title": "\n".join(notes),
            "kind": kind,
            "glyph": piece.hex().upper() if kind == "byte" else glyph(piece),
            "bars": [{"height": _height(value, full), "above": view.is_above(value)} for value in bits],
            "ends_line": piece == b"\n",
        }
        at, length = at + len(piece), None


def _height(bits: float, full: int) -> str:
    return f"{100 * _within(bits, full) / full:.3g}%"
