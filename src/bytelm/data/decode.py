"""Compressed files as a stream of bytes, checked for damage and for bombs."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Protocol, cast, runtime_checkable

from bytelm.data.files import PIECE
from bytelm.errors import DataError, MissingExtraError

# What the names of compressed files end in → the format.
COMPRESSED = {name: name for name in (".gz", ".bz2", ".xz", ".lzma", ".zst")} | {".zstd": ".zst"}

# What a decoder is fed at a time. Of the formats that cannot be decoded in steps (`_steps`) the densest makes 32 KiB
# out of one byte, so that a feed never becomes more than 32 MiB before the limits below are checked.
_FEED = 1 << 10
RATIO = 1000  # decoded bytes per compressed byte read, above
SLACK = 64 << 20  # this many bytes that are always allowed
_NAMED = (".jsonl", ".ndjson", ".tar")  # whose contents are read as their names say, see `formats`
MAX_WINDOW = 256  # MiB of what was decoded before that a file may refer to; a decoder holds as much in memory


@runtime_checkable
class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def decoded(read: Callable[[int], bytes], suffix: str, name: str, max_window: int = MAX_WINDOW) -> Iterator[bytes]:
    """What a file in one of the COMPRESSED formats decodes to, in pieces of at most PIECE bytes.

    Raises DataError naming the file when it is damaged or truncated, expands beyond a thousand times what was read
    of it plus 64 MiB, or has a window (a dictionary, in xz) of more than `max_window` MiB; MissingExtraError when .zst
    cannot be read here.
    """
    new, failure = _decoder(suffix, name, max_window)
    return in_pieces(_decode(read, new, failure, suffix, name, max_window))


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


def _decoder(suffix: str, name: str, max_window: int) -> tuple[Callable[[], _Decoder], type[Exception]]:
    """A maker of decoders for the format, and what they raise at damage."""
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if suffix == ".bz2":
        return bz2.BZ2Decompressor, OSError
    if suffix in (".xz", ".lzma"):
        limit = (max_window + 1) << 20  # the decoder itself takes some
        return lambda: lzma.LZMADecompressor(memlimit=limit), lzma.LZMAError
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data", f"reading {name}") from error
    window = max_window << 20
    return lambda: cast(
        _Decoder, zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
    ), zstandard.ZstdError


def _decode(
    read: Callable[[int], bytes],
    new: Callable[[], _Decoder],
    failure: type[Exception],
    suffix: str,
    name: str,
    max_window: int,
) -> Iterator[bytes]:
    """The decoded bytes as the decoder gives them. A file may hold several streams, each with zeros behind it."""
    decoder, taken, made = new(), 0, 0
    while chunk := read(_FEED):
        taken += len(chunk)
        while chunk:
            if decoder.eof:
                chunk = chunk.lstrip(b"\0")  # of tapes and of disks that are written in blocks
                if not chunk:
                    break
                decoder = new()
            try:
                for out in _steps(decoder, chunk):
                    made += len(out)
                    if made > RATIO * taken + SLACK:
                        raise swells(name, f"{made} bytes from the first {taken}", "")
                    yield out
            except failure as error:
                raise _refused(error, suffix, name, max_window) from error
            chunk = decoder.unused_data if decoder.eof else b""
    if taken and not decoder.eof:
        raise DataError(f"{name} is truncated (its compressed data is incomplete): get a complete copy")


def _steps(decoder: _Decoder, chunk: bytes) -> Iterator[bytes]:
    """What a chunk decodes to, a piece at a time where the decoder can: bz2 makes a megabyte out of one byte."""
    if isinstance(decoder, bz2.BZ2Decompressor | lzma.LZMADecompressor):
        yield decoder.decompress(chunk, PIECE)
        while not (decoder.eof or decoder.needs_input):
            yield decoder.decompress(b"", PIECE)
    else:
        yield decoder.decompress(chunk)


def swells(name: str, made: str, of: str) -> DataError:
    """The error of a file that makes too much of itself."""
    return DataError(
        f"{name} expands to more than {made} (limit: {RATIO} times {of}plus {SLACK}): "
        "decompress it yourself if it can be trusted"
    )


def _refused(error: Exception, suffix: str, name: str, max_window: int) -> DataError:
    """What to say of what a decoder raised: of one kind of refusal the user can be rid of."""
    if not any(word in str(error) for word in ("Memory usage limit", "too much memory")):
        return DataError(f"{name} cannot be decompressed: {error}")
    tool = "zstd -d{} --long=31" if suffix == ".zst" else "xz -d{}"
    # Data from a pipe has no file name, and would be read as raw bytes.
    if PurePath(name).stem.lower().endswith(_NAMED) or name.lower().endswith((".tzst", ".txz")):
        way = f"decompress it beforehand, as in `{tool.format('')} {name}`"
    else:
        way = f"decompress it on the way, as in `{tool.format('c')} {name} | bytelm train -`"
    return DataError(
        f"{name} has a window or dictionary larger than data.max_window = {max_window} MiB: allow more memory, as in "
        f"--set data.max_window=2048, or {way}"
    )
