"""Bytes as things the eye can see: whole characters where the bytes are one, the value of the byte where not."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from rich.cells import cell_len

MARKS = {b"\n": "⏎", b"\t": "⇥"}  # the two control characters that text is made of
CIRCLE = "◌"  # what Unicode sets under a combining mark that stands alone


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut bytes into UTF-8 characters that can be shown; every other byte is a piece of its own. Nothing is lost."""
    at = 0
    while at < len(data):
        length = _claimed(data[at])
        piece = data[at : at + length]
        if length > 1 and character(piece) is None:
            piece = data[at : at + 1]
        yield piece
        at += len(piece)


def character(piece: bytes) -> str | None:
    """The one character these bytes are, or None if they are not one or it leaves no trace on paper."""
    if piece in MARKS:
        return piece.decode()
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    # Controls, direction overrides, joiners, private and unassigned characters are not printable; a few fillers
    # are, and are empty all the same.
    seen = len(text) == 1 and text.isprintable() and (_is_mark(text) or cell_len(text) > 0)
    return text if seen else None


def glyph(piece: bytes) -> str:
    """What stands for one piece on its own: the character, ⏎ and ⇥, or ‹E2› for a byte that is no character."""
    if piece in MARKS:
        return MARKS[piece]
    text = character(piece)
    if text is None:
        return "".join(f"‹{byte:02X}›" for byte in piece)
    return CIRCLE + text if _is_mark(text) else text


def _claimed(first: int) -> int:
    """The length of the character that its first byte claims; whether the claim holds, decoding will tell."""
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _is_mark(text: str) -> bool:
    return unicodedata.category(text).startswith("M")
