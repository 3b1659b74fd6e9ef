"""Compressed files as a stream of bytes, checked for damage and for bombs."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, cast

from bytelm.data.files import PIECE
from bytelm.errors import DataError, MissingExtraError

COMPRESSED = frozenset({".gz", ".xz", ".zst"})

# What a decoder is fed at a time. The densest format makes 32 KiB out of one byte, so that a feed never becomes
# more than 32 MiB before the limits below are looked at.
_FEED = 1 << 10
RATIO = 1000  # decoded bytes per compressed byte read, above
SLACK = 64 << 20  # this many bytes that are always allowed
_DICTIONARY = 256 << 20  # bytes of memory that an xz file may ask for


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def decoded(read: Callable[[int], bytes], suffix: str, name: str) -> Iterator[bytes]:
    """What a file with one of the COMPRESSED suffixes decodes to, in pieces of at most PIECE bytes.

    Raises DataError naming the file when it is damaged, ends too early, or swells beyond a thousand times what was
    read of it plus 64 MiB; MissingExtraError when .zst cannot be read here.
    """
    new, failure = _decoder(suffix, name)
    try:
        yield from in_pieces(_decode(read, new, name))
    except failure as error:
        raise DataError(f"{name} cannot be decompressed: {error}") from error


def in_pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of exactly PIECE bytes, the last one shorter."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= PIECE:
            yield bytes(held[:PIECE])
            del held[:PIECE]
    if held:
        yield bytes(held)


def _decoder(suffix: str, name: str) -> tuple[Callable[[], _Decoder], type[Exception]]:
    """A maker of decoders for the suffix, and what they raise at damage."""
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if suffix == ".xz":
        return lambda: lzma.LZMADecompressor(memlimit=_DICTIONARY), lzma.LZMAError
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data", f"reading {name}") from error
    return lambda: cast(_Decoder, zstandard.ZstdDecompressor().decompressobj()), zstandard.ZstdError


def _decode(read: Callable[[int], bytes], new: Callable[[], _Decoder], name: str) -> Iterator[bytes]:
    """The decoded bytes as the decoder gives them. A file may hold several compressed streams in a row."""
    decoder, taken, made = new(), 0, 0
    while chunk := read(_FEED):
        taken += len(chunk)
        while chunk:
            if decoder.eof:
                decoder = new()
            out = decoder.decompress(chunk)
            made += len(out)
            if made > RATIO * taken + SLACK:
                raise DataError(
                    f"{name} swells to more than {made} bytes from the first {taken} (limit: {RATIO} times plus "
                    f"{SLACK}): decompress it yourself if it can be trusted"
                )
            yield out
            chunk = decoder.unused_data.lstrip(b"\0") if decoder.eof else b""  # streams may be padded with zeros
    if taken and not decoder.eof:
        raise DataError(f"{name} ends in the middle of its compressed data: get a whole copy")
