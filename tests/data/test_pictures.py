"""Picture files that are sound for all that is odd in them, those that are not, and formats that plugins bring."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from bytelm.data import pictures
from bytelm.data.modalities import image
from bytelm.data.modalities.base import DamagedError, UnfitError

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
MODALITY = image.Config(4, 4, block=1).build()


def read(data: bytes) -> tuple[list[bytes], dict[str, int]]:
    notes: Counter[str] = Counter()
    return list(MODALITY.encode("x", data, notes)), dict(notes)


def png(*texts: tuple[str, str, bool], **options: Any) -> bytes:
    """A picture with texts: keyword, text, whether it is compressed."""
    info = PngImagePlugin.PngInfo()
    for keyword, text, packed in texts:
        info.add_itxt(keyword, text, zip=packed)
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", pnginfo=info, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


# --- PNG and its text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3 << 20, 70 << 20])
def test_pixels_behind_any_amount_of_text_are_read(size: int) -> None:
    """Image generators keep a workflow there, microscopes a protocol; Pillow holds 1 MB of each and 64 MB of all."""
    data = png(("prompt", "x" * size, True), ("note", "y", False))
    with pytest.raises(ValueError, match=r"text|Decompressed"):
        Image.open(io.BytesIO(data)).load()
    assert read(data) == ([PIXELS.tobytes()], {})
    late = png()[:-12] + data[33 : data.index(b"IDAT") - 4] + png()[-12:]
    assert read(late) == ([PIXELS.tobytes()], {})


def test_text_that_turns_a_picture_is_kept() -> None:
    turned = '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="3"/>'
    data = png(("XML:com.adobe.xmp", turned, False), ("prompt", "x" * (3 << 20), True))
    assert read(data)[0] == [PIXELS[::-1, ::-1].tobytes()]


@pytest.mark.fault("D9")
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"gAMA", b"tIME"])
def test_a_wrong_checksum_is_damage(kind: bytes) -> None:
    data, content = png(), {b"zTXt": b"a\0\0" + zlib.compress(b"b"), b"gAMA": b"\0\0\0\1"}.get(kind, b"a\0b")
    said = "a damaged image: it has the signature of PNG, and its header or a checksum is wrong"
    with pytest.raises(DamagedError, match=said):
        read(data[:33] + chunk(kind, content, wrong=1) + data[33:])


@pytest.mark.fault("D9")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "JPEG2000", "QOI"])
def test_what_begins_as_a_picture_and_is_none_is_damaged(form: str) -> None:
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form)
    with pytest.raises(DamagedError, match="a damaged image: "):
        read(file.getvalue()[:17])
    for text in (b"Python is a language", b"BMW is a car", b"P3 is a name", b"hello", b"", b"GIF"):
        with pytest.raises(UnfitError) as caught:
            read(text)
        assert not isinstance(caught.value, DamagedError) or text[:2] in (b"BM", b"P3")


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")  # of files that an old numpy cannot read
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_any_format(version: tuple[int, int]) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.stack([PIXELS, PIXELS[::-1]]), version)
    assert read(file.getvalue()) == ([PIXELS.tobytes(), PIXELS[::-1].tobytes()], {})
    named = io.BytesIO()
    np.lib.format.write_array(named, np.zeros(3, [("größe", "u1")]), (3, 0))
    with pytest.raises(UnfitError, match=r"an array of \[.*\], not of uint8"):
        read(named.getvalue())


# --- plugins ----------------------------------------------------------------------------------------------------------


class Grey(ImageFile.ImageFile):
    """A format of another package: a mark, and 16-bit samples of a 4 x 4 picture."""

    format = "GREY16"

    def _open(self) -> None:
        assert self.fp is not None
        assert self.fp.read(6) == b"GREY16"
        self._size, self._mode = (4, 4), "I;16"
        self.tile = [ImageFile._Tile("raw", (0, 0, 4, 4), 6, ("I;16", 0, 1))]


@pytest.fixture
def plugin() -> Iterator[None]:
    Image.register_open("GREY16", Grey, lambda prefix: prefix.startswith(b"GREY16"))
    yield
    Image.ID.remove("GREY16")
    del Image.OPEN["GREY16"]


def test_a_format_that_another_package_brings_is_read(plugin: None) -> None:
    deep = np.arange(0, 65536, 4096, dtype="<u2")
    data = b"GREY16" + deep.tobytes()
    (document,), notes = read(data)
    assert document == (deep >> 8).astype(np.uint8).repeat(3).tobytes()
    assert notes == {"of 16 bits, reduced to 8": 1}
    assert "EPS" not in pictures._formats() and "GREY16" in pictures._formats()


def test_without_its_plugin_a_format_is_named_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_PLUGINS", ())
    monkeypatch.setattr(pictures, "_formats", lambda: ["PNG"])
    heif = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    jxl = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "
    for data, said in ((jxl, "pillow-jxl-plugin"), (b"\xff\n\x01", "pillow-jxl-plugin"), (heif, "pillow-heif")):
        with pytest.raises(UnfitError, match=f"image, which Pillow reads with a plugin: pip install {said}") as caught:
            read(data)
        assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize(("package", "form"), [("pillow_jxl", "JXL"), ("pillow_heif", "HEIF")])
def test_installed_plugins_need_no_import(package: str, form: str) -> None:
    pytest.importorskip(package)
    if form not in pictures._formats():
        pytest.skip(f"this {package} does not register {form} when it is imported")
    file = io.BytesIO()
    Image.fromarray(PIXELS.repeat(16, 0).repeat(16, 1)).save(
        file, form, **({"lossless": True} if form == "JXL" else {})
    )
    (document,), _ = read(file.getvalue())
    assert np.abs(np.frombuffer(document, np.uint8).astype(int) - PIXELS.ravel()).max() <= (0 if form == "JXL" else 40)
