"""Images: pixels come back in any scan, what is lost is counted, and what is unfit is skipped with a reason."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from bytelm.data.modalities import image
from bytelm.data.modalities.base import UnfitError
from media_files import encoded, one, picture, raster, saved

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> NDArray[np.uint8]:
    return RANDOM.integers(0, 256, shape, np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bare_png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG made by hand: of kinds that Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@settings(max_examples=60)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 25), st.booleans(), st.data())
def test_images_of_any_size_come_back_from_any_scan(
    width: int, height: int, block: int, grey: bool, data: st.DataObject
) -> None:
    modality = image.Config(width, height, grey, block).build()
    assert modality.size == width * height * (1 if grey else 3) == modality.grain
    document = data.draw(st.binary(min_size=modality.size, max_size=modality.size))
    assert one(modality, modality.decode(document)) == (document, {})
    order = image.scan(width, height, block)
    assert sorted(order.tolist()) == list(range(width * height))


def test_the_patch_scan_reads_square_after_square() -> None:
    assert image.scan(4, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert image.scan(3, 3, 2).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]  # the squares at the edges are smaller
    assert image.scan(3, 2, 1).tolist() == list(range(6))
    pixels = noise(8, 8, 3)
    document, _ = one(image.Config(8, 8, block=4).build(), picture(pixels))
    assert document[:48] == pixels[:4, :4].tobytes() and document[48:96] == pixels[:4, 4:].tobytes()
    assert one(raster(8, 8), picture(pixels))[0] == pixels.tobytes()  # RGB of a pixel side by side


def test_an_unfinished_image_is_shown_with_black() -> None:
    modality = raster(4, 2)
    shown = np.asarray(Image.open(io.BytesIO(modality.decode(b"\xff" * 13))))
    assert shown.tobytes() == b"\xff" * 13 + b"\0" * 11
    assert modality.decode(b"\xff" * 99) == modality.decode(b"\xff" * 24)


def test_other_sizes_are_cut_around_the_middle_and_averaged() -> None:
    pixels = np.zeros((4, 10, 3), np.uint8)
    pixels[:, 3:7] = noise(4, 4, 3)
    document, notes = one(raster(2, 2), picture(pixels))
    mean = pixels[:, 3:7].reshape(2, 2, 2, 2, 3).mean((1, 3))
    assert np.abs(np.frombuffer(document, np.uint8).reshape(2, 2, 3) - mean).max() <= 1  # rows and columns are rounded
    assert notes == {"cropped": 1, "resized": 1}
    assert one(raster(5, 2), picture(pixels))[1] == {"resized": 1}
    assert one(raster(4, 4), picture(pixels)) == (pixels[:, 3:7].tobytes(), {"cropped": 1})
    assert one(raster(4, 4), picture(pixels.transpose(1, 0, 2).copy()))[0] == pixels[:, 3:7].swapaxes(0, 1).tobytes()
    assert len(one(raster(64, 64), picture(pixels))[0]) == 64 * 64 * 3
    assert one(raster(3, 1), picture(noise(1, 1, 3)))[1] == {"resized": 1}  # there is always a pixel left


def test_the_orientation_that_a_camera_noted_is_applied() -> None:
    pixels = noise(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    assert one(raster(2, 3), picture(pixels, exif=exif)) == (np.rot90(pixels, -1).tobytes(), {})


def test_palettes_greys_and_bits_lose_nothing() -> None:
    pixels = noise(4, 4, 3) // 128 * 255
    palette = io.BytesIO()
    Image.fromarray(pixels).quantize(8, dither=Image.Dither.NONE).save(palette, "PNG")
    assert one(raster(4, 4), palette.getvalue()) == (pixels.tobytes(), {})
    grey = noise(4, 4)
    assert one(raster(4, 4), picture(grey)) == (grey.repeat(3).tobytes(), {})
    assert one(raster(4, 4, grey=True), picture(grey)) == (grey.tobytes(), {})
    assert one(raster(4, 4), picture(grey > 99)) == (((grey > 99) * np.uint8(255)).repeat(3).tobytes(), {})
    assert one(raster(4, 4, grey=True), picture(pixels))[1] == {"converted to grey": 1}


def test_transparency_is_laid_on_white_and_counted() -> None:
    pixels = noise(4, 4, 4)
    pixels[..., 3] = 255
    assert one(raster(4, 4), picture(pixels)) == (pixels[..., :3].tobytes(), {})
    pixels[0, 0], pixels[0, 1] = (10, 20, 30, 0), (10, 20, 30, 128)
    document, notes = one(raster(4, 4), picture(pixels))
    assert notes == {"transparent, composited on white": 1}
    assert document[:3] == b"\xff\xff\xff"
    assert np.abs(np.frombuffer(document[3:6], np.uint8) - (np.array([10, 20, 30]) + 255) / 2).max() <= 1
    assert document[6:] == pixels[..., :3].tobytes()[6:]
    palette = Image.fromarray(noise(4, 4, 3)).quantize(4)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=int(np.asarray(palette)[0, 0]))
    document, notes = one(raster(4, 4), file.getvalue())
    assert document[:3] == b"\xff\xff\xff" and notes == {"transparent, composited on white": 1}


def test_of_16_bits_the_high_ones_are_kept_and_not_clipped() -> None:
    deep = np.array([[0, 255, 256, 1000], [30000, 40000, 65000, 65535]], np.uint16)
    counted = {"of 16 bits, reduced to 8": 1}
    high = (deep >> 8).astype(np.uint8)
    for data in (picture(deep), picture(deep, "TIFF"), b"P5 4 2 65535\n" + deep.astype(">u2").tobytes()):
        assert one(raster(4, 2, grey=True), data) == (high.tobytes(), counted)
        assert one(raster(4, 2), data) == (high.repeat(3).tobytes(), counted)
    colour = RANDOM.integers(0, 65536, (2, 3, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    assert one(raster(3, 2), bare_png(3, 2, 16, 2, rows)) == ((colour >> 8).astype(np.uint8).tobytes(), counted)
    for odd, reason in ((deep.astype(np.float32), "floating-point"), (deep.astype(np.int32) << 8, "32 bits")):
        notes: Counter[str] = Counter()
        with pytest.raises(UnfitError, match=reason):
            next(raster(4, 2).encode("x", picture(odd, "TIFF"), notes))
        assert not notes


def test_other_colours_and_further_frames_are_counted() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(4, 4, 3)).convert("CMYK").save(file, "TIFF")
    document, notes = one(raster(4, 4), file.getvalue())
    assert len(document) == 48 and notes == {"converted to RGB": 1}
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 255)]
    for form in ("GIF", "PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
        assert one(raster(4, 4), file.getvalue()) == (b"\0" * 48, {"of several frames, only the first used": 1})


@pytest.mark.fault("D9")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000"])
def test_damaged_images_are_unfit(form: str) -> None:
    modality, data = raster(64, 64), picture(noise(64, 64, 3), form)
    assert len(one(modality, data)[0]) == 64 * 64 * 3
    for cut in (12, len(data) // 3, len(data) * 2 // 3):
        with pytest.raises(UnfitError, match=r"^(not an image|a damaged image: .+)$"):
            encoded(modality, data[:cut])


def test_whatever_a_decoder_raises_is_a_reason() -> None:
    for header in (b"P6 8\xc9 8 255\n", b"P6 8 8 0\n", b"P6 8"):  # ValueError rather than OSError
        with pytest.raises(UnfitError, match="a damaged image: "):
            encoded(raster(8, 8), header + bytes(192))


@pytest.mark.fault("D9")
@settings(max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP"]), st.integers(0, 300))
def test_whatever_is_in_an_image_file_is_a_document_or_unfit(noise: bytes, form: str, at: int) -> None:
    data = bytearray(picture(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), form))
    data[at : at + len(noise)] = noise
    try:
        assert len(one(raster(8, 8), bytes(data))[0]) == 192
    except UnfitError as error:
        assert "\n" not in str(error)


def test_no_text_is_taken_for_an_image_and_no_program_is_started() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    for data in (b"hello world\n" * 50, postscript, b"a", b"\0" * 400):
        with pytest.raises(UnfitError, match=r"^not an image$"):
            encoded(raster(8, 8), data)


@pytest.mark.fault("D8")
@pytest.mark.parametrize("side", [10_000, 20_000, 2_000_000_000])
def test_a_bomb_is_not_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UnfitError, match="more pixels than 89478485"):
        encoded(raster(8, 8), bare_png(side, side, 8, 2, b"\0" * 100))


def test_arrays_are_as_many_images() -> None:
    pixels = noise(5, 8, 8, 3)
    modality = image.Config(8, 8).build()
    documents, notes = encoded(modality, saved(pixels), "x.npy")
    assert documents == [one(modality, picture(p))[0] for p in pixels] and notes == {}
    assert encoded(modality, saved(np.asfortranarray(pixels)))[0] == documents
    assert encoded(modality, saved(pixels[0]))[0] == documents[:1]
    assert encoded(raster(8, 8, grey=True), saved(pixels[..., :1]))[0] == [p[..., 0].tobytes() for p in pixels]
    assert encoded(raster(4, 4), saved(pixels))[1] == {"resized": 5}
    for array in (pixels.astype(np.float32), pixels[..., :2], pixels[0, 0], np.empty((2, 0, 8, 3), np.uint8)):
        with pytest.raises(UnfitError, match="an array of"):
            encoded(modality, saved(array))
    with pytest.raises(UnfitError, match=r"an array of \[5, 8, 8, 3\] in \d+ bytes"):
        encoded(modality, saved(pixels)[:-1])
    for shape in (b"(5000, 8, 8, 3), }", b"(-5, 8, 8, 3), }  ", b"(5, 8, -8, 3), }  "):
        with pytest.raises(UnfitError, match="an array of"):
            encoded(modality, saved(pixels).replace(b"(5, 8, 8, 3), }   ", shape))
    brackets, signs = (b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + text * 9000 for text in (b"[", b"-"))
    for data in (saved(pixels)[:20], brackets, signs, b"\x93NUMPY", saved(np.array([{}, 1], object))):
        with pytest.raises(UnfitError, match="array"):
            encoded(modality, data)


def test_the_formats_made_for_images_are_measured() -> None:
    flat, rough = bytes(8 * 8 * 3), noise(8 * 8 * 3).tobytes()
    sizes = image.Config(8, 8).build().compressors()
    assert sizes.keys() == {"png", "webp"}
    for size in sizes.values():
        assert 20 < size(flat) < 100 < size(rough)
    assert raster(8, 8, grey=True).compressors()["png"](bytes(64)) < 100
    for size in image.Config(64, 64).build().compressors().values():
        assert 12288 < size(noise(12288).tobytes()) < 12800  # noise has no shorter form without loss


def test_without_pillow_images_stop_and_the_rest_goes_on() -> None:
    code = """
import sys
sys.modules["PIL"] = None
from collections import Counter
from bytelm.data.modalities.image import Config
from bytelm.errors import MissingExtraError
modality = Config(8, 8).build()
assert modality.size == 192 and modality.compressors() == {}
for use in (lambda: next(modality.encode("x.png", b"", Counter())), lambda: modality.decode(b"")):
    try:
        use()
    except MissingExtraError as error:
        print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "reading x.png needs Pillow, which is not installed: pip install 'bytelm[media]'" in shown
    assert len(shown.splitlines()) == 2
