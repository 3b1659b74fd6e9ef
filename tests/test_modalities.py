"""Images, sound and DNA: what is kept comes back, what is lost is counted, and what is unfit is skipped by name."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import tomllib
import wave
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from bytelm.cli import run as cli
from bytelm.config import build, dump_toml, to_mapping
from bytelm.data import convert, sounds
from bytelm.data.corpus import Corpus, Index, iterate_documents
from bytelm.data.modalities import audio, dna, image
from bytelm.data.modalities.base import Modality, UnfitError
from bytelm.data.pack import pack
from bytelm.data.selection import spread
from bytelm.errors import ConfigError, DataError, MissingExtraError
from bytelm.find import find, names
from bytelm.training.config import RunConfig
from bytelm.training.journal import Journal
from bytelm.training.prepare import prepare
from bytelm.training.settings import configure

RANDOM = np.random.default_rng(0)


def encoded(modality: Modality, data: bytes, name: str = "file") -> tuple[list[bytes], dict[str, int]]:
    notes: Counter[str] = Counter()
    return list(modality.encode(name, data, notes)), dict(notes)


def one(modality: Modality, data: bytes, name: str = "file") -> tuple[bytes, dict[str, int]]:
    (document,), notes = encoded(modality, data, name)
    return document, notes


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image:64", image.Config(64, 64)),
        ("image", image.Config()),
        ("image:96x64:grey:patch8", image.Config(96, 64, grey=True, block=8)),
        ("image:7:raster", image.Config(7, 7, block=1)),
        ("audio:16k", audio.Config(16000)),
        ("audio:22.05k:8bit", audio.Config(22050, bits=8)),
        ("audio:44100:16bit", audio.Config(44100)),
        ("dna", dna.Config()),
    ],
)
def test_a_spec_is_a_table_that_goes_through_toml_and_back(text: str, expected: Any) -> None:
    name, _, spec = text.partition(":")
    table = {"name": name, **find("data.modalities", name).Config.parse(spec)}
    run = {"model": {"name": "transformer"}, "train": {"steps": 1}}
    config = build(RunConfig, run | {"modality": table}, "test")
    assert config.modality == expected
    assert build(RunConfig, tomllib.loads(dump_toml(to_mapping(config))), "test") == config
    assert isinstance(config.modality.build(), Modality)


def test_every_modality_has_defaults_and_a_parser() -> None:
    for name in names("data.modalities"):
        config = find("data.modalities", name).Config
        assert config.parse("") == {} and isinstance(config().build(), Modality)


@pytest.mark.parametrize(
    ("config", "spec"),
    [(image.Config, "64:gray"), (image.Config, "64x"), (image.Config, ""), (audio.Config, "12bit"), (dna.Config, "64")],
)
def test_a_spec_of_unknown_words_is_refused(config: Any, spec: str) -> None:
    if spec:
        with pytest.raises(ConfigError, match=repr(spec.split(":")[-1])):
            config.parse(spec)
    for wrong in ({"width": 0}, {"height": 4097}, {"block": 0}) if config is image.Config else ():
        with pytest.raises(ConfigError, match=rf"modality\.{next(iter(wrong))} = "):
            image.Config(**wrong)
    for rate in (999, 192001) if config is audio.Config else ():
        with pytest.raises(ConfigError, match=r"modality\.rate = "):
            audio.Config(rate)


# --- images -----------------------------------------------------------------------------------------------------------


def picture(pixels: NDArray[Any], form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def noise(*shape: int) -> NDArray[np.uint8]:
    return RANDOM.integers(0, 256, shape, np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bare_png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG made by hand: of kinds that Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def raster(width: int, height: int, grey: bool = False) -> Modality:
    return image.Config(width, height, grey, block=1).build()


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


def saved(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


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


# --- sound ------------------------------------------------------------------------------------------------------------


def wav(samples: NDArray[Any] | bytes, rate: int = 16000, width: int = 2, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(samples if isinstance(samples, bytes) else samples.tobytes())
    return file.getvalue()


def by_soundfile(samples: NDArray[Any], form: str, subtype: str, rate: int = 16000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=form)
    return file.getvalue()


AUDIO = audio.Config().build()
CLIP = RANDOM.integers(-(1 << 15), 1 << 15, 500).astype("<i2")


@settings(max_examples=40)
@given(st.binary(max_size=64), st.sampled_from([8, 16]), st.sampled_from([8000, 16000, 44100]))
def test_pcm_comes_back_bit_by_bit(data: bytes, bits: int, rate: int) -> None:
    modality = audio.Config(rate, bits).build()  # type: ignore[arg-type]
    whole = data[: len(data) // modality.unit * modality.unit]
    assert one(modality, modality.decode(data)) == (whole, {})  # an odd byte at the end is left out
    if bits == 16:
        assert one(modality, whole, "clip.s16le") == (whole, {})


def test_all_samples_of_16_and_8_bits_are_kept() -> None:
    every = np.arange(-(1 << 15), 1 << 15).astype("<i2")
    assert one(AUDIO, wav(every)) == (every.tobytes(), {})
    assert one(AUDIO, by_soundfile(every, "FLAC", "PCM_16")) == (every.tobytes(), {})
    small = np.arange(256).astype(np.uint8)
    assert one(audio.Config(bits=8).build(), wav(small, width=1)) == (small.tobytes(), {})
    assert one(AUDIO, wav(small, width=1)) == (((small.astype("<i2") - 128) << 8).tobytes(), {})
    assert (AUDIO.planes, AUDIO.unit) == (("low byte", "high byte"), 2)
    assert (audio.Config(bits=8).build().planes, audio.Config(bits=8).build().unit) == ((), 1)


@pytest.mark.parametrize("width", [3, 4])
def test_finer_samples_are_rounded_and_counted(width: int) -> None:
    fine = CLIP.astype(np.int64) * (1 << (8 * width - 16))
    raw = fine.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    assert one(AUDIO, wav(raw, width=width)) == (CLIP.tobytes(), {})
    fine = np.array([0x7FFFFF, -0x800000, 0x0000FF, 0x000001, -0x0000FF], np.int64) * (1 << (8 * width - 24))
    raw = fine.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    document, notes = one(AUDIO, wav(raw, width=width))
    assert np.frombuffer(document, "<i2").tolist() == [32767, -32768, 1, 0, -1]
    assert notes == {"rounded to 16 bits": 1}


def test_channels_are_averaged() -> None:
    both = np.stack([CLIP // 4 * 2, CLIP // 8 * 2], 1)
    document, notes = one(AUDIO, wav(both, channels=2))
    assert np.frombuffer(document, "<i2").tolist() == both.mean(1).astype("<i2").tolist()
    assert notes == {"mixed down to mono": 1}


@pytest.mark.parametrize(("old", "new"), [(44100, 16000), (8000, 16000), (16000, 8000), (11025, 16000), (16001, 16000)])
def test_another_rate_keeps_what_both_can_hold_and_nothing_else(old: int, new: int) -> None:
    def tone(rate: int, frequency: float, count: int) -> NDArray[np.float64]:
        time = np.arange(count) / rate - 0.25
        return np.sin(2 * np.pi * frequency * time) * np.exp(-(((time) / 0.05) ** 2))

    low, high = 1234.5, 0.75 * max(old, new) / 2
    samples = tone(old, low, old // 2)
    if high < old / 2 and high > 1.1 * new / 2:
        samples += tone(old, high, old // 2)
    clip = np.rint(samples * 12000).astype("<i2")
    document, notes = one(audio.Config(new).build(), wav(clip, old))
    found = np.frombuffer(document, "<i2")
    assert len(found) == -(-len(clip) * new // old) and notes == {f"resampled to {new} Hz": 1}
    assert np.abs(found - 12000 * tone(new, low, len(found))).max() < 3


def test_the_end_of_a_clip_does_not_ring_into_its_beginning() -> None:
    clip = np.zeros(8000, "<i2")
    clip[-40:] = 20000
    found = np.frombuffer(one(AUDIO, wav(clip, 8000))[0], "<i2")
    assert np.abs(found[:1000]).max() <= 2 and found[-40:].max() > 15000


def test_an_empty_clip_is_an_empty_document() -> None:
    assert encoded(AUDIO, wav(b"", 8000, 2, 2)) == ([b""], {})


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("FLAC", "PCM_16"), ("AIFF", "PCM_16"), ("CAF", "PCM_16")],
)
def test_other_files_are_read_by_soundfile(form: str, subtype: str) -> None:
    data = by_soundfile(CLIP if "PCM" in subtype else CLIP / 32768, form, subtype)
    assert one(AUDIO, data) == (CLIP.tobytes(), {})
    if form != "CAF":
        with pytest.raises(UnfitError):
            encoded(AUDIO, data[: len(data) // 2])


def test_what_goes_beyond_full_scale_is_clipped_and_counted() -> None:
    document, notes = one(AUDIO, by_soundfile(np.array([2.0, -1.5, 0.5, 1.0]), "WAV", "FLOAT"))
    assert np.frombuffer(document, "<i2").tolist() == [32767, -32768, 16384, 32767] and notes == {"clipped": 1}


@pytest.mark.parametrize(("form", "subtype"), [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_files_are_read_too(form: str, subtype: str) -> None:
    tone = np.rint(9000 * np.sin(np.arange(8000) / 7)).astype("<i2")
    document, notes = one(AUDIO, by_soundfile(tone, form, subtype))
    found = np.frombuffer(document, "<i2")[: len(tone)]
    assert np.corrcoef(found, tone[: len(found)])[0, 1] > 0.9 and notes == {"rounded to 16 bits": 1}


def test_without_soundfile_only_what_needs_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [by_soundfile(CLIP, form, subtype) for form, subtype in (("WAV", "FLOAT"), ("FLAC", "PCM_16"))]
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert one(AUDIO, wav(CLIP)) == (CLIP.tobytes(), {})
    for data in files:
        with pytest.raises(MissingExtraError, match=r"reading x\.flac needs soundfile.*bytelm\[media\]"):
            encoded(AUDIO, data, "x.flac")
    with pytest.raises(UnfitError, match="not an audio file"):
        encoded(AUDIO, b"a text", "x.txt")
    assert AUDIO.compressors() == {}


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


@pytest.mark.fault("D9")
def test_damaged_and_foreign_files_are_unfit_with_a_reason() -> None:
    whole = wav(CLIP)
    extensible = struct.pack("<HHIIHH", 1, 1, 0, 0, 2, 16)
    no_rate = b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + struct.pack("<I", 16) + extensible + b"data\0\0\0\0"
    cases = {
        whole[:-2]: "ends after 499 of 500 samples",
        whole[:100]: "ends after 28 of 500 samples",
        whole[:30]: "ends in its header|damaged WAV",
        b"RIFF": "ends in its header",
        no_rate: "0 samples of 16 bits per second",
        b"RIFF\x04\0\0\0AVI ": "damaged WAV file",
        b"hello": "not an audio file",
        b"fLaC" + b"\0" * 99: "damaged or unknown",
    }
    for data, reason in cases.items():
        with pytest.raises(UnfitError, match=reason):
            encoded(AUDIO, data)
    with pytest.raises(UnfitError, match="odd number of bytes"):
        encoded(AUDIO, b"abc", "x.s16le.xz")
    with pytest.raises(UnfitError, match="not finite"):
        encoded(AUDIO, by_soundfile(np.array([0.0, np.nan, 1.0]), "WAV", "FLOAT"))


@pytest.mark.fault("D8")
def test_a_clip_that_is_too_long_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "_LONGEST", 499)
    for data, name in ((wav(CLIP), "x.wav"), (CLIP.tobytes(), "x.s16le"), (by_soundfile(CLIP, "FLAC", "PCM_16"), "x")):
        with pytest.raises(UnfitError, match="500 samples, more than 499"):
            encoded(AUDIO, data, name)


def test_flac_is_measured() -> None:
    tone = np.rint(9000 * np.sin(np.arange(4000) / 30)).astype("<i2")
    rough = RANDOM.integers(-(1 << 15), 1 << 15, 4000).astype("<i2")
    size = AUDIO.compressors()["flac"]
    assert size(tone.tobytes()) < 3000 < 7000 < size(rough.tobytes())
    small = audio.Config(8000, bits=8).build()
    assert small.compressors()["flac"](bytes([128]) * 4000) < 200
    assert small.compressors()["flac"](rough.tobytes()[:4000]) > 3500
    assert size(b"") == size(b"a") < 200


# --- DNA --------------------------------------------------------------------------------------------------------------

DNA = dna.Config().build()


@settings(max_examples=40)
@given(st.text("ACGTURYSWKMBDHVN-.*", min_size=1, max_size=200))
def test_sequences_come_back(letters: str) -> None:
    document = letters.encode()
    file = DNA.decode(document)
    assert one(DNA, file) == (document, {}) == one(DNA, document + b"\n")


def test_every_record_is_a_document() -> None:
    assert DNA.decode(b"A" * 61) == b">document\n" + b"A" * 60 + b"\nA\n"
    fasta = b">one ACGT is a header\r\nACG\r\nTNN\r\n>two\nacgt\n>three\n\n>four\nA-C*\n"
    assert encoded(DNA, fasta) == ([b"ACGTNN", b"ACGT", b"", b"A-C*"], {"converted to upper case": 1})
    assert encoded(DNA, b"ACGT\n>two\nGG")[0] == [b"ACGT", b"GG"]
    assert encoded(DNA, b"\n\n>two\nGG")[0] == [b"GG"]
    for data, letter in ((b"ACGT\n>two\nACE", "'E'"), (b"Hello", "'E'"), (b"AC1", "'1'"), (b"AC\xffG", "'ÿ'")):
        with pytest.raises(UnfitError, match=f"^{letter} is not a DNA letter$"):
            next(DNA.encode("x", data, Counter()))  # before the first document


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_fasta_of_any_line_end_with_a_mark_comments_and_gaps(end: bytes, mark: bytes) -> None:
    records = ([b"ACGT", b"A-C..G*", b"TT"], {})
    new = end.join(
        [mark + b">one; ACGT", b";comment", b"AC", b"; within", b"GT", b">two", b"A-C.", b".G*", b">three", b"TT"]
    )
    old = end.join(
        [mark + b";one", b";comment", b"AC", b"GT", b";two", b"A-C.", b".G*", b"", b";three", b";", b"TT", b""]
    )
    assert encoded(DNA, new) == records == encoded(DNA, old)
    assert encoded(DNA, mark + b"AC" + end + b"GT") == ([b"ACGT"], {})
    for wide in ("utf-16-le", "utf-16-be"):
        with pytest.raises(UnfitError, match="text in UTF-16: save it as UTF-8"):
            encoded(DNA, "\ufeff>one\nACGT".encode(wide))


# --- packed -----------------------------------------------------------------------------------------------------------


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def contents(corpus: Corpus) -> list[bytes]:
    return [data.tobytes() for _, data in iterate_documents(corpus)]


@pytest.mark.fault("D9")
def test_a_mixed_folder_gives_its_images_and_names_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = [noise(4, 4, 3) for _ in range(40)]
    files = {f"{i:02d}.png": picture(p) for i, p in enumerate(pixels)}
    files |= {"notes.jsonl": b"not json\n", "readme.txt": b"hello", "y.npy": saved(np.stack(pixels))}
    files |= {"cut.png": picture(noise(64, 64, 3))[:5000], "large.png": picture(noise(8, 8, 3)), "void": b""}
    monkeypatch.setattr(convert, "LARGEST", 8000)
    files["z.bin"] = b"\0" * 8001
    source = folder_of(tmp_path / "s", files)
    with pytest.raises(DataError, match=r"--as image: 1 of 43 files are damaged.*cut\.png: .*data\.max_bad = 0\.001"):
        pack([source], tmp_path / "p", modality=raster(4, 4))
    corpus = pack([source], tmp_path / "p", modality=raster(4, 4), max_bad=1 / 43)
    found = contents(corpus)
    assert found[:40] == [p.tobytes() for p in pixels] == found[41:] and set(map(len, found)) == {48}
    report = Index.load(tmp_path / "p").source
    reasons = {Path(name).name: reason for name, reason in report.skipped}
    assert reasons.keys() == {"notes.jsonl", "readme.txt", "cut.png", "z.bin"}
    assert reasons["readme.txt"] == "not an image" and "truncated" in reasons["cut.png"] and "MiB" in reasons["z.bin"]
    assert (report.files, report.empty, report.bad, report.converted) == (47, 1, 1, {"resized": 1})
    assert report.reasons == {"not an image": 2, "a damaged image": 1, "more than 0 MiB": 1}
    assert report.losses()[0].startswith(f"4 skipped (the first {source / 'cut.png'}: a damaged image")
    assert report.losses()[1:] == ["1 empty skipped", "1 damaged skipped", "1 resized"]


def test_nothing_fit_is_one_line_with_the_reasons(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", {"a.txt": b"hello", "b.wav": wav(b"")})
    with pytest.raises(
        DataError, match=r"no bytes found in .*2 files; skipped .*a\.txt: not an audio file; skipped .*"
    ) as e:
        pack([source], tmp_path / "p", modality=AUDIO)
    assert "\n" not in str(e.value) and not (tmp_path / "p").exists()


def test_long_clips_are_cut_between_samples_and_images_never(tmp_path: Path) -> None:
    clip = RANDOM.integers(0, 256, 20018, np.uint8)  # a sixteenth of it is odd
    clip[1::2] = ord("\n")  # where text would be cut
    source = folder_of(tmp_path / "s", {"x.s16le": clip.tobytes(), "y.wav": wav(b"")})
    corpus = pack([source], tmp_path / "p", modality=AUDIO)
    sizes = corpus.documents().sizes
    assert len(sizes) >= 16 and set(sizes[:-1].tolist()) == {1250} and b"".join(contents(corpus)) == clip.tobytes()
    assert corpus.source_report.reasons == {"no audio data in it": 1} and corpus.grain == 2
    few = folder_of(tmp_path / "t", {"x.npy": saved(noise(3, 32, 32, 3))})
    corpus = pack([few], tmp_path / "q", modality=raster(32, 32))
    assert corpus.documents().sizes.tolist() == [3072] * 3 and corpus.grain == 3072


def test_a_corpus_packed_before_there_were_modalities_opens(tmp_path: Path) -> None:
    pack([folder_of(tmp_path / "s", {"a": b"hello"})], tmp_path / "p")
    index = tmp_path / "p" / "index.json"
    old = json.loads(index.read_text())
    for key in ("checksum", "grain", "modality", "options", "repeated", "looked"):
        del old[key]
    old["source"] = {"files": 2, "empty": 0, "bad_lines": 3, "skipped": [["x", "a link"], ["y", "a link"]]}
    index.write_text(json.dumps(old))
    corpus = Corpus.open(tmp_path / "p")
    assert (corpus.grain, corpus.index.options, corpus.source_report.bad) == (1, None, 3)
    assert corpus.source_report.losses() == ["2 skipped (the first x: a link)", "3 damaged skipped"]


def test_a_selection_parts_no_image_and_no_sample(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", {"x.npy": saved(noise(20, 8, 8, 3))})
    corpus = pack([source], tmp_path / "p", modality=raster(8, 8), valid=0, test=0)
    for limit, count in ((192 * 5 + 100, 4), (192, 1), (100, 1), (1, 1), (None, 20)):
        found = [len(data) for _, data in spread(corpus, "train", limit)]
        assert set(found) == {192} and (limit is None or sum(found) <= max(limit, 192))
        assert len(found) >= count
    source = folder_of(tmp_path / "t", {f"{i}.s16le": noise(100).tobytes() for i in range(9)})
    corpus = pack([source], tmp_path / "q", modality=AUDIO, valid=0, test=0)
    for limit in (899, 333, 99, 3, 1):
        found = [len(data) for _, data in spread(corpus, "train", limit)]
        assert found and not any(size % 2 for size in found) and sum(found) <= max(limit, 2)


# --- trained ----------------------------------------------------------------------------------------------------------

NANO = """
[model]
name = "blt"
local_dim = 16
local_heads = 2
cross_heads = 2
global_dim = 32
global_heads = 2
global_layers = 1
decoder_layers = 1
window = 16
ngram_rows = 64

[patching]
name = "fixed"
size = 12

[train]
batch = 2
sample_bytes = 8
precision = "float32"
"""


def trained(tmp_path: Path, source: Path, spec: str, *more: str) -> int:
    (tmp_path / "nano.toml").write_text(NANO)
    words = ["train", str(source), "--as", spec, "--run", str(tmp_path / "run"), "--steps", "2"]
    return cli([*words, "--config", str(tmp_path / "nano.toml"), *more])


def test_a_run_on_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {f"{i:02d}.png": picture(noise(8, 8, 3)) for i in range(30)} | {"big.png": picture(noise(32, 16, 3))}
    source = folder_of(tmp_path / "s", files | {"readme.txt": b"hello"})
    assert trained(tmp_path, source, "image:8") == 0
    told = capfd.readouterr().err
    name = source / "readme.txt"
    assert f"data: 32 files, 1 skipped ({name}: not an image), 1 cropped, 1 resized, 5.95 kB: " in told
    config = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert config["modality"] == {"name": "image", "width": 8, "height": 8, "grey": False, "block": 2}
    assert config["train"]["context_length"] == 8 * 8 * 3 + 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows and not any("sample" in str(row) for row in rows)

    assert cli(["eval", str(tmp_path / "run"), str(source / "big.png"), str(name), "--json"]) == 0
    out, told = capfd.readouterr()
    assert json.loads(out)["bytes"] == 192 and told == f"1 skipped ({name}: not an image), 1 cropped, 1 resized\n"
    assert cli(["eval", str(tmp_path / "run"), str(name)]) == 3
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and f"skipped {name}: not an image" in told

    assert trained(tmp_path, source, "image:8:raster", "--quiet") == 2
    assert "modality.block was 2, now 1" in capfd.readouterr().err
    assert trained(tmp_path, source, "image:8", "--quiet") == 0


def test_windows_of_images_start_where_images_do(tmp_path: Path) -> None:
    """Two windows an image, as asked for: the second starts at the same byte of every image."""
    pixels = np.full((30, 8, 8, 3), np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    pixels[:, 0, 0, 0] = range(200, 230)
    source = folder_of(tmp_path / "s", {"x.npy": saved(pixels)})
    config = configure(
        None, None, ["patching.name=fixed", "train.context_length=97"], modality="image:8:raster", steps=1
    )
    tmp_path.joinpath("run").mkdir()
    prepared = prepare(
        [source], config, tmp_path / "run", Journal(tmp_path / "metrics.jsonl", True), torch.device("cpu")
    )
    assert prepared.valid is not None
    for sampler in (prepared.sampler, prepared.valid):
        starts = {int(row[1]) for step in range(20) for row in sampler.batch(step).ids}
        assert starts <= {*range(200, 230), 97} and 97 in starts


def test_a_run_on_sound_and_one_on_dna(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clips = folder_of(tmp_path / "s", {f"{i}.wav": wav(CLIP[i:], 8000) for i in range(9)} | {"no.wav": wav(b"")})
    assert trained(tmp_path, clips, "audio:8k") == 0
    told = f"data: 10 files, 1 skipped ({clips / 'no.wav'}: no audio data in it), 8.93 kB: "
    assert told in capfd.readouterr().err
    config = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert config["train"]["context_length"] == 8192  # what the preset for sound says
    assert "sample" not in (tmp_path / "run/metrics.jsonl").read_text()
    letters = [bytes(RANDOM.choice(list(b"acgt"), 200).astype(np.uint8)) for _ in range(20)]
    genes = folder_of(tmp_path / "t", {"x.fasta": b"".join(b">header\n%b\n" % text for text in letters)})
    (tmp_path / "dna").mkdir()
    assert trained(tmp_path / "dna", genes, "dna") == 0
    assert "data: 1 files, 20 converted to upper case, 4 kB: " in capfd.readouterr().err
    assert "sample" in (tmp_path / "dna/run/metrics.jsonl").read_text()


def test_the_window_is_one_image_unless_something_says_otherwise(tmp_path: Path) -> None:
    def train(modality: str | None, *sets: str, file: str = "") -> tuple[int, int]:
        (tmp_path / "x.toml").write_text(file)
        config = configure("blt-tiny", tmp_path / "x.toml", sets, modality=modality, steps=1).train
        return config.context_length, config.batch

    assert train(None) == (1024, 4)  # what the preset says, 4096 bytes a step
    assert train("image:32") == (3073, 1)
    assert train("image:16") == (769, 5)
    assert train("image:16", "train.batch=3") == (769, 3)
    assert train("image:16", "train.context_length=512") == (512, 4)
    assert train("image:16", file="[train]\nwindow = 100") == (100, 4)
    assert train(None, file='[modality]\nname = "image"\nwidth = 16\nheight = 16') == (769, 5)
    assert train("image:64") == (12289, 1)  # three times a step
    assert train("image:128") == (1024, 4)  # would be twelve times a step
    assert train("audio:16k") == train("dna") == (1024, 4)
    for wrong, message in (
        ("imag:64", "unknown modality 'imag': did you mean 'image'?"),
        ("image:6.5", "--as image:6.5: '6.5' is none of"),
        ("image:0", "--as image:0: modality.width = 0: must be between 1 and 4096"),
        ("dna:4", "--as dna:4: '4' is not an option of dna"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            configure(modality=wrong)
