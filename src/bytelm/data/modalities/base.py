"""The one interface of every modality: files become documents of bytes, and documents become files again.

A modality is one file, with a frozen dataclass `Config` in which every field has a default. Its `build` makes the
modality, and its class method `parse` turns what follows the name in `--as NAME:SPEC` into a mapping of its keys:
"64:grey" of `image:64:grey` becomes {"width": 64, "height": 64, "grey": True}. It raises ConfigError for other words.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from bytelm.config import to_mapping
from bytelm.errors import DataError
from bytelm.find import name_of


class UnfitError(DataError):
    """A file that holds nothing of the modality: it is skipped, counted and named with this reason."""


class DamagedError(UnfitError):
    """A file that is of the modality, or is named as one, and cannot be read as such: not many of those may be."""


class Modality(abc.ABC):
    """What the bytes of documents represent.

    `encode` may lose what the configuration says it loses (size, sampling rate, colour), and counts it. What it gives
    is kept exactly: decoding a document and encoding the file again gives the same document.
    """

    config: Any
    """What it was built from."""

    suffix: str
    """Of the files that `decode` makes: ".png"."""

    suffixes: frozenset[str] = frozenset()
    """Suffixes of files of the modality: ".png", ".jpg"."""

    planes: tuple[str, ...] = ()
    """The planes that bytes of a document alternate between: ("red", "green", "blue"). Empty where all are alike."""

    size: int | None = None
    """Bytes of every document, where all have the same. None where they differ."""

    unit: int = 1
    """Bytes that make sense together only, and are never parted: one sample of sound, one pixel."""

    row: int = 1
    """Bytes that a part kept of a document is a multiple of: a row of an image's blocks, so that halves are halves."""

    aligned: bool = False
    """Whether windows of training start where documents start, and every so many bytes from there.

    So each place of a patch always holds the same plane; text has no planes, and any phase will do.
    """

    text: bool = False
    """Whether people can read documents as they are."""

    @property
    def grain(self) -> int:
        """A document may be cut after every so many bytes: after each unit, or not at all where all have one size."""
        return self.size or self.unit

    @abc.abstractmethod
    def encode(self, name: str, data: bytes, notes: Counter[str]) -> Iterator[bytes]:
        """The documents in the file `name` that holds `data`, decompressed; the caller skips empty ones.

        `notes` counts conversions that lose something, by words that follow the count: "mixed down to mono". Raises
        UnfitError with a reason of a few words, DamagedError where the file begins as one of the modality and is none,
        and MissingExtraError, before the first document is given.
        """

    @abc.abstractmethod
    def decode(self, document: bytes) -> bytes:
        """A document as a file; an unfinished one is filled up (black) or truncated."""

    def compressors(self) -> dict[str, Callable[[bytes], int]]:
        """Lossless formats made for this modality, by name: each says how many bytes it makes of one document."""
        return {}

    @property
    def table(self) -> dict[str, Any]:
        """As a configuration has it: `name`, and the keys of its `Config`."""
        return {"name": self.name, **to_mapping(self.config)}

    @property
    def name(self) -> str:
        """As `--as` and `[modality] name` have it."""
        return name_of(self.config)


def unit_of(modality: Modality | None) -> str:
    """What bits are counted on: in documents of one size, such as images, a byte is called a dimension."""
    return "bits per byte" if modality is None or modality.size is None else "bits per dimension"
