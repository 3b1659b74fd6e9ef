"""Bytes as visible text: characters where bytes are valid UTF-8, the value of the byte elsewhere."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from rich.cells import cell_len

MARKS = {b"\n": "⏎", b"\t": "⇥"}
CIRCLE = "◌"  # base of an isolated combining mark


def pieces(data: bytes) -> Iterator[bytes]:
    """Split bytes into printable UTF-8 characters; every other byte is a separate piece. Lossless."""
    at = 0
    while at < len(data):
        length = _claimed(data[at])
        piece = data[at : at + length]
        if length > 1 and character(piece) is None:
            piece = data[at : at + 1]
        yield piece
        at += len(piece)


def character(piece: bytes) -> str | None:
    """The character that these bytes encode, or None if they are not one, or it is invisible."""
    if piece in MARKS:
        return piece.decode()
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    # Controls, direction overrides, joiners, private and unassigned characters are not printable; some fillers are
    # printable, but blank.
    seen = len(text) == 1 and text.isprintable() and (_is_mark(text) or cell_len(text) > 0)
    return text if seen else None


def glyph(piece: bytes) -> str:
    """A piece as text: the character, ⏎ or ⇥, or ‹E2› for a byte that is not a character."""
    if piece in MARKS:
        return MARKS[piece]
    text = character(piece)
    if text is None:
        return "".join(f"‹{byte:02X}›" for byte in piece)
    return CIRCLE + text if _is_mark(text) else text


def _claimed(first: int) -> int:
    """The length of a character by its first byte; decoding checks the rest."""
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _is_mark(text: str) -> bool:
    return unicodedata.category(text).startswith("M")
