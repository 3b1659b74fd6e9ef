"""Bits per byte of general-purpose compressors on the same bytes: the reference for a model."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Mapping

from bytelm.errors import DataError
from bytelm.evaluate.stream import Document, pieces
from bytelm.units import LN2, bits_per_byte


def compressed(documents: Iterable[Document]) -> dict[str, float]:
    """Bits per byte of gzip -9, bzip2 -9 and xz -9e, by those names, headers and checksums included.

    All documents together, in order and with nothing between them, are one stream to each compressor: it may learn from
    one document for the next, which a model that is reset at each may not. Nothing is held but the compressors'
    own memory, up to 674 MiB for xz. Raises DataError if there are no bytes.
    """
    compressors = {
        "gzip": zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16),  # 16: in gzip's format
        "bzip2": bz2.BZ2Compressor(9),
        "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    }
    count = 0
    sizes = dict.fromkeys(compressors, 0)
    for document in documents:
        for piece in pieces(document):
            count += len(piece)
            for name, compressor in compressors.items():
                sizes[name] += len(compressor.compress(piece.tobytes()))
    if not count:
        raise DataError("there is nothing to compress: the documents have 0 bytes; give at least 1")
    for name, compressor in compressors.items():
        sizes[name] += len(compressor.flush())
    return {name: bits_per_byte(8 * size * LN2, count) for name, size in sizes.items()}


def compressed_each(documents: Iterable[Document], formats: Mapping[str, Callable[[bytes], int]]) -> dict[str, float]:
    """Bits per byte of formats that hold one document a file, such as PNG, headers and checksums included.

    `formats` say how many bytes each makes of one document; empty ones are left out. Raises DataError if all are.
    """
    if not formats:
        return {}
    count = 0
    sizes = dict.fromkeys(formats, 0)
    for document in documents:
        data = b"".join(piece.tobytes() for piece in pieces(document))
        count += len(data)
        for name, size in formats.items():
            sizes[name] += size(data) if data else 0
    if not count:
        raise DataError("there is nothing to compress: the documents have 0 bytes; give at least 1")
    return {name: bits_per_byte(8 * size * LN2, count) for name, size in sizes.items()}
