"""Images of one size: one byte per channel, channels interleaved, pixels in blocks (patch scan) or in raster order.

Any image file that Pillow decodes itself or with an installed plugin is taken, and arrays in .npy files. An image is
turned as its EXIF says, cut around its middle to the proportions wanted, and brought to the size: down with a box
filter, up with a bicubic one. Transparent parts are laid on white; of 16 bits the high 8 are kept; of several frames
the first is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.files import shown
from bytelm.data.modalities.base import Modality
from bytelm.errors import ConfigError, MissingExtraError

_SIDE = 4096  # pixels: the longest side


@dataclass(frozen=True)
class Config:
    """`width` x `height` pixels, of red, green and blue or of `grey` alone, read in blocks of `block` x `block` pixels.

    Blocks follow each other in raster order, and so do the pixels in each (those at the right and lower edge may be
    smaller). This is MEGABYTE's patch scan: a patch of block² · channels bytes is a square of the image. 2 goes with
    patches of 12 bytes of colour, 4 with 48, 8 with 192; 1 is the raster scan.
    """

    width: int = 64
    height: int = 64
    grey: bool = False
    block: int = 2

    def __post_init__(self) -> None:
        problems = [
            f"modality.{name} = {getattr(self, name)}: must be between 1 and {_SIDE}"
            for name in ("width", "height", "block")
            if not 1 <= getattr(self, name) <= _SIDE
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def parse(cls, spec: str) -> dict[str, Any]:
        """Words between colons: 64 or 96x64 (width x height), grey, raster, patch8 (the side of the blocks)."""
        found: dict[str, Any] = {}
        for word in spec.split(":") if spec else []:
            if size := re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", word):
                found |= {"width": int(size[1]), "height": int(size[2] or size[1])}
            elif block := re.fullmatch(r"patch(\d{1,9})", word):
                found["block"] = int(block[1])
            elif word == "raster":
                found["block"] = 1
            elif word == "grey":
                found["grey"] = True
            else:
                raise ConfigError(f"{word!r} is none of 64, 96x64 (any width and height), grey, raster, patch8 (any)")
        return found

    def build(self) -> Image:
        """The modality of this configuration."""
        return Image(self)


class Image(Modality):
    """Every document is one image of width * height * channels bytes."""

    suffix = ".png"
    suffixes = frozenset(
        {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif", ".qoi"}
    )
    aligned = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.planes = ("grey",) if config.grey else ("red", "green", "blue")
        self.unit = len(self.planes)
        self.size = config.width * config.height * self.unit
        self.row = config.width * config.block * self.unit
        self._order = scan(config.width, config.height, config.block)

    def encode(self, name: str, data: bytes, notes: Counter[str]) -> Iterator[bytes]:
        """One document an image; N of a .npy file of uint8 `[N, height, width, 3 or 1]`."""
        pictures = _pictures(f"reading {shown(name)}")
        size = (self.config.width, self.config.height)
        for picture in pictures.pictures(data, notes):
            pixels = pictures.fitted(picture, size, self.config.grey, notes)
            yield pixels.reshape(-1, self.unit)[self._order].tobytes()

    def decode(self, document: bytes) -> bytes:
        """A PNG. What a shorter document lacks is black."""
        return _pictures("writing a PNG").saved(self._pixels(document), "PNG")

    def compressors(self) -> dict[str, Callable[[bytes], int]]:
        """PNG as small as zlib makes it, and lossless WebP; none without Pillow."""
        try:
            _pictures("compressing")
        except MissingExtraError:
            return {}
        options = {"png": {"optimize": True}, "webp": {"lossless": True, "exact": True, "quality": 100, "method": 6}}
        return {name: partial(self._saved_size, name.upper(), options[name]) for name in options}

    def _saved_size(self, form: str, options: dict[str, Any], document: bytes) -> int:
        return len(_pictures("compressing").saved(self._pixels(document), form, **options))

    def _pixels(self, document: bytes) -> NDArray[np.uint8]:
        """uint8 `[height, width, channels]`."""
        count = len(self._order) * self.unit
        whole = np.frombuffer(document[:count].ljust(count, b"\0"), np.uint8)
        pixels = np.empty((self.config.height, self.config.width, self.unit), np.uint8)
        pixels.reshape(-1, self.unit)[self._order] = whole.reshape(-1, self.unit)
        return pixels


def scan(width: int, height: int, block: int) -> NDArray[np.int64]:
    """In which order pixels are read, `[height * width]`: their numbers in raster order. A permutation."""
    y, x = np.divmod(np.arange(width * height, dtype=np.int64), width)
    return np.lexsort((x, y, x // block, y // block)).astype(np.int64)  # the last key weighs most


def _pictures(purpose: str) -> ModuleType:
    """The module that uses Pillow. Raises MissingExtraError without it."""
    try:
        from bytelm.data import pictures
    except ImportError as error:
        raise MissingExtraError("Pillow", "media", purpose) from error
    return pictures
