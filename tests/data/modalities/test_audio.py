"""Sound: samples come back bit by bit, what is rounded or clipped is counted, and what is unfit is skipped."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bytelm.data import sounds
from bytelm.data.modalities import audio
from bytelm.data.modalities.base import UnfitError
from bytelm.errors import MissingExtraError
from media_files import AUDIO, CLIP, by_soundfile, encoded, one, wav

RANDOM = np.random.default_rng(0)


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
