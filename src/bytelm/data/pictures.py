"""Picture files as arrays of pixels and back. Needs Pillow, so that only the modality of images imports it, in use."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from bytelm.data.modalities.base import DamagedError, UnfitError

# Formats that begin with a mark of their own and that Pillow decodes itself: text is never taken for a picture, and no
# other program is started (for EPS that would be Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI")
_NPY = b"\x93NUMPY"
_GREYS = {"1", "L", "LA", "La"}
_COLOURS = _GREYS | {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}


def pictures(data: bytes, notes: Counter[str]) -> Iterator[Image.Image]:
    """The pictures in a file, 8 bits a channel, upright. Raises UnfitError before the first one."""
    if data.startswith(_NPY):
        yield from (Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels) for pixels in _arrays(data))
    else:
        yield _opened(data, notes)


def fitted(picture: Image.Image, size: tuple[int, int], grey: bool, notes: Counter[str]) -> NDArray[np.uint8]:
    """The pixels of a picture brought to `size` (width, height), uint8 `[height, width, 3 or 1]`."""
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
    """The picture in a file, of 8 bits and upright; its first frame where it has several."""
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of whatever is odd in a file that can be read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
            several = bool(getattr(image, "is_animated", False))
            deep = _is_deep(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
        except UnidentifiedImageError:
            raise UnfitError("not an image") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise DamagedError(f"more pixels than {Image.MAX_IMAGE_PIXELS}") from None
        except Exception as error:  # Pillow's decoders raise whatever they run into at damage
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DamagedError(f"a damaged image: {reason}") from None
    upright = _eight_bits(upright)
    for word, seen in (("of several frames, the first kept", several), ("of 16 bits, the high 8 kept", deep)):
        if seen:
            notes[word] += 1
    return upright


def _arrays(data: bytes) -> NDArray[np.uint8]:
    """The images in an .npy file, `[images, height, width, 3 or 1]`, without a copy of them."""
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        shape, by_columns, kind = np.lib.format.read_array_header_1_0(file)
    except Exception:  # the header is Python, and its parser raises more than ValueError: TokenError, RecursionError
        raise DamagedError("a damaged array") from None
    if kind != np.uint8 or len(shape) not in (3, 4) or shape[-1] not in (1, 3) or min(shape[-3:]) < 1:
        raise UnfitError(f"an array of {kind} {list(shape)}, not of uint8 [images, height, width, 3 or 1]")
    if not 0 <= math.prod(shape) <= len(data) - file.tell():
        raise DamagedError(f"an array of {list(shape)} in {len(data)} bytes")
    pixels = np.frombuffer(data, np.uint8, math.prod(shape), file.tell())
    return pixels.reshape(shape, order="F" if by_columns else "C").reshape(-1, *shape[-3:])


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file has 16 bits a channel. Of colour Pillow keeps the high 8 itself and does not tell."""
    return image.mode.startswith("I") or any(mark in str(tile.args) for tile in image.tile for mark in (";16", "65535"))


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
    """The picture in the mode, laid on white where it is transparent."""
    if picture.mode not in (_GREYS if mode == "L" else _COLOURS):
        notes["converted to grey" if mode == "L" else "converted to RGB"] += 1
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] != 255:
            notes["transparent, laid on white"] += 1
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            picture = white
    return picture.convert(mode)
