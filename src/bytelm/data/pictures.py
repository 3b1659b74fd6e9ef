"""Image files as arrays of pixels and back. Needs Pillow, and is imported lazily by the modality of images."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bytelm.data.modalities.base import DamagedError, UnfitError

# Formats that begin with a mark of their own and that Pillow decodes itself: text is never taken for an image, and no
# other program is started (for EPS that would be Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI")
_SHORT = {"BMP", "PPM"}  # whose marks are two letters, with which a text may begin too
# Formats are added to Pillow by packages that someone installed for that: these do when they are imported.
_PLUGINS = ("pillow_jxl", "pillow_heif.HeifImagePlugin")
_WITH_PLUGIN = {
    b"\xff\n": "JPEG XL image, which Pillow reads with a plugin: pip install pillow-jxl-plugin",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL image, which Pillow reads with a plugin: pip install pillow-jxl-plugin",
    **dict.fromkeys(
        (b"ftypheic", b"ftypheix", b"ftypmif1"),
        "HEIF image, which Pillow reads with a plugin: pip install pillow-heif",
    ),
}
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_UPRIGHT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # text that says how an image is turned
_NPY = b"\x93NUMPY"
_GREYS = {"1", "L", "LA", "La"}
_COLOURS = _GREYS | {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}


def pictures(data: bytes, notes: Counter[str]) -> Iterator[Image.Image]:
    """The images in a file, 8 bits a channel, upright. Raises UnfitError before the first one."""
    if data.startswith(_NPY):
        yield from (Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels) for pixels in _arrays(data))
    else:
        yield _opened(data, notes)


def fitted(picture: Image.Image, size: tuple[int, int], grey: bool, notes: Counter[str]) -> NDArray[np.uint8]:
    """The pixels of an image brought to `size` (width, height), uint8 `[height, width, 3 or 1]`."""
    width, height = size
    picture = _plain(picture, "L" if grey else "RGB", notes)
    # The largest part of the wanted proportions, around the middle.
    cut = (
        max(1, min(picture.width, picture.height * width // height)),
        max(1, min(picture.height, picture.width * height // width)),
    )
    if cut != picture.size:
        notes["cropped"] += 1
        left, top = (picture.width - cut[0]) // 2, (picture.height - cut[1]) // 2
        picture = picture.crop((left, top, left + cut[0], top + cut[1]))
    if cut != size:
        notes["resized"] += 1
        smaller = width <= cut[0] and height <= cut[1]
        picture = picture.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(height, width, -1)


def saved(pixels: NDArray[np.uint8], form: str, **options: Any) -> bytes:
    """Pixels, uint8 `[height, width, 3 or 1]`, as a file of a format."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, form, **options)
    return file.getvalue()


def _opened(data: bytes, notes: Counter[str]) -> Image.Image:
    """The image in a file, of 8 bits and upright; its first frame where it has several."""
    try:
        try:
            upright, several, deep = _loaded(data)
        except ValueError:
            if not data.startswith(_PNG):
                raise
            # Pillow gives a PNG up that has more text than it would hold, whose pixels are sound
            upright, several, deep = _loaded(_without_text(data))
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DamagedError(f"more pixels than {Image.MAX_IMAGE_PIXELS}") from None
    except Exception as error:  # Pillow's decoders raise whatever they run into at damage
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedError(f"a damaged image: {reason}") from None
    upright = _eight_bits(upright)
    for word, seen in (("of several frames, only the first used", several), ("of 16 bits, reduced to 8", deep)):
        if seen:
            notes[word] += 1
    return upright


def _loaded(data: bytes) -> tuple[Image.Image, bool, bool]:
    """The first image in a file, upright; whether there are further ones; whether it has 16 bits a channel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of whatever is odd in a file that can be read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=_formats())
        several = bool(getattr(image, "is_animated", False))
        deep = _is_deep(image)
        image.load()
        return ImageOps.exif_transpose(image), several, deep


def _formats() -> list[str]:
    """What may be decoded: a few of Pillow's own formats, and all that other packages have added to it."""
    _load_plugins()
    return [
        name
        for name, (factory, _) in Image.OPEN.items()
        if name in _FORMATS or not str(getattr(factory, "__module__", "PIL")).startswith("PIL")
    ]


@functools.cache
def _load_plugins() -> None:
    Image.init()
    for plugin in _PLUGINS:
        with contextlib.suppress(ImportError):
            importlib.import_module(plugin)


def _unidentified(data: bytes) -> UnfitError:
    """Why no format of Pillow's takes a file: it may still begin as one of them."""
    for mark, what in _WITH_PLUGIN.items():
        if data.startswith(mark) or (mark.startswith(b"ftyp") and data[4:].startswith(mark)):
            return UnfitError(f"a {what}")
    for name in _FORMATS:
        accepts = Image.OPEN[name][1] if name in Image.OPEN and name not in _SHORT else None
        if accepts is not None and accepts(data[:16]) is True:  # words, where it lacks a library
            return DamagedError(
                f"a damaged image: it has the signature of {name}, and its header or a checksum is wrong"
            )
    return UnfitError("not an image")


def _without_text(data: bytes) -> bytes:
    """A PNG without its chunks of text, but for those that are damaged or say how the image is turned."""
    kept, at = [data[: len(_PNG)]], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])  # size, kind, content, checksum
        kind, content, checksum = data[at + 4 : at + 8], data[at + 8 : end - 4], data[end - 4 : end]
        sound = zlib.crc32(content, zlib.crc32(kind)).to_bytes(4) == checksum
        if kind not in _TEXT or content.startswith(_UPRIGHT) or not sound:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _arrays(data: bytes) -> NDArray[np.uint8]:
    """The images in an .npy file, `[images, height, width, 3 or 1]`, without a copy of them."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        # Formats 2 and 3 are laid out alike; 3 has names of fields in UTF-8, which bytes alone do not have
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, kind = header(file)
    except Exception:  # the header is Python, and its parser raises more than ValueError: TokenError, RecursionError
        raise DamagedError("a damaged array") from None
    if kind != np.uint8 or len(shape) not in (3, 4) or shape[-1] not in (1, 3) or min(shape[-3:]) < 1:
        raise UnfitError(f"an array of {kind} {list(shape)}, not of uint8 [images, height, width, 3 or 1]")
    if not 0 <= math.prod(shape) <= len(data) - file.tell():
        raise DamagedError(f"an array of {list(shape)} in {len(data)} bytes")
    pixels = np.frombuffer(data, np.uint8, math.prod(shape), file.tell())
    return pixels.reshape(shape, order="F" if by_columns else "C").reshape(-1, *shape[-3:])


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel. Of colour Pillow keeps the high 8 itself and does not tell."""
    tiles: list[Any] = getattr(image, "tile", [])
    return image.mode.startswith("I") or any(mark in str(tile.args) for tile in tiles for mark in (";16", "65535"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or the high bytes of one of 16 bits, which Pillow would clip rather than divide."""
    if image.mode == "F":
        raise UnfitError("pixels that are floating-point numbers")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UnfitError("pixels of 32 bits")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _plain(picture: Image.Image, mode: str, notes: Counter[str]) -> Image.Image:
    """The image in the mode, laid on white where it is transparent."""
    if picture.mode not in (_GREYS if mode == "L" else _COLOURS):
        notes["converted to grey" if mode == "L" else "converted to RGB"] += 1
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] != 255:
            notes["transparent, composited on white"] += 1
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            picture = white
    return picture.convert(mode)
