"""Sound files as programs really write them: into pipes, in rare formats, with headers that are odd or wrong."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from bytelm.cli import run as cli
from bytelm.data import sound
from bytelm.data.modalities.base import DamagedError, UnfitError
from bytelm.data.sound import read

RATE = 8000
TONE = np.rint(9000 * np.sin(np.arange(3200) / 7)).astype("<i2")


def written(form: str, subtype: str, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, TONE, rate, subtype, format=form)
    return file.getvalue()


def riff(form: bytes, data: bytes, order: str = "<", size: int | None = None, whole: int | None = None) -> bytes:
    """A WAV file, whose header may say other sizes."""
    parts = b"WAVEfmt " + struct.pack(order + "I", len(form)) + form
    parts += b"data" + struct.pack(order + "I", len(data) if size is None else size) + data
    length = len(parts) if whole is None else whole
    return (b"RIFX" if order == ">" else b"RIFF") + struct.pack(order + "I", length) + parts


def pcm(bits: int = 16, block: int = 2, channels: int = 1, order: str = "<", tag: int = 1) -> bytes:
    return struct.pack(order + "HHIIHH", tag, channels, RATE, RATE * block, block, bits)


def extensible(tag: int, bits: int) -> bytes:
    guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
    return pcm(bits, bits // 8, tag=0xFFFE) + struct.pack("<HHI", 22, bits, 4) + guid


def samples(data: bytes) -> NDArray[np.float32]:
    rate, found = read("x.wav", data)
    assert rate == RATE and found.shape[1] == 1
    return found[:, 0]


def equals(found: NDArray[Any], least: float) -> bool:
    """Whether these are the tone's samples; lossy formats may add some, and come close."""
    part = found[: len(TONE)]
    return len(TONE) <= len(found) < len(TONE) + 900 and float(np.corrcoef(part, TONE)[0, 1]) > least


LOSSY = ["GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32", "IMA_ADPCM", "MS_ADPCM", "ULAW", "ALAW"]
FORMS = [("WAV", kind) for kind in LOSSY] + [
    ("AU", "G723_24"),
    ("AU", "G723_40"),
    ("AU", "G721_32"),
    ("AIFF", "GSM610"),
]


@pytest.mark.parametrize(("form", "subtype"), FORMS)
def test_formats_of_telephones_are_read(form: str, subtype: str) -> None:
    """Some of them the library can only read from beginning to end."""
    assert equals(samples(written(form, subtype)), 0.9)


# What stands in headers that were written before the end was known: ffmpeg; others; sox and espeak-ng; speech services.
SIZES = [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 2_000_000_000, 0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "GSM610", "MS_ADPCM"]
)
def test_a_size_that_no_file_has_means_to_the_end(subtype: str, size: int) -> None:
    whole = written("WAV", subtype)
    wanted = samples(whole)
    at = whole.index(b"data") + 4
    streamed = whole[:at] + struct.pack("<I", size) + whole[at + 4 :]
    for told in (size, min(size + 36, 0xFFFFFFFF), 0, 36):
        assert np.array_equal(samples(streamed[:4] + struct.pack("<I", told) + streamed[8:]), wanted)
    if subtype == "PCM_16":  # half a sample at the end is none
        assert np.array_equal(samples(streamed[:4] + struct.pack("<I", size) + streamed[8:-1]), wanted[:-1])


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_aiff_from_a_pipe(subtype: str) -> None:
    """Sizes of 0, as ffmpeg writes them, and of two gigabytes, as sox does."""
    whole = written("AIFF", subtype)
    common, ssnd = whole.index(b"COMM") + 10, whole.index(b"SSND") + 4
    for form, frames, size in ((0, 0, 0), (0x7F000050, 0x7F000000 // (int(subtype[4:]) // 8), 0x7F000008)):
        streamed = bytearray(whole)
        for at, number in ((4, form), (common, frames), (ssnd, size)):
            streamed[at : at + 4] = struct.pack(">I", number)
        assert np.array_equal(samples(bytes(streamed)), samples(whole))


def test_what_is_cut_short_is_not_taken_for_a_stream() -> None:
    for subtype in ("PCM_16", "FLOAT", "ULAW"):
        whole = written("WAV", subtype)
        with pytest.raises(DamagedError, match=r"ends after .* of 3200 samples"):
            read("x.wav", whole[:-200])
    with pytest.raises(DamagedError, match="ends too early"):
        read("x.aiff", written("AIFF", "PCM_16")[:-200])


def test_no_samples_are_none_whatever_comes_behind() -> None:
    """A size of 0 is meant where the header knows how long the file is."""
    behind = b"LIST" + struct.pack("<I", 4) + b"abcd"
    for form in (pcm(), extensible(3, 32)):
        honest = riff(form, b"", whole=4 + 8 + len(form) + 8 + len(behind)) + behind
        assert len(samples(honest)) == 0
        assert len(samples(riff(form, b"", whole=0))) == 0
        assert len(samples(riff(form, bytes(32), size=0, whole=0))) == 32 // struct.unpack("<H", form[12:14])[0]


def test_the_format_is_decided_by_its_tag_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by what another library says of it, which differs from one Python to the next."""
    fine = (TONE.astype("<i4") << 8).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    monkeypatch.setattr(wave, "open", lambda *_: pytest.fail("asked the wave module"))
    floats = (TONE / 32768).astype("<f4").tobytes()
    for data in (riff(extensible(3, 32), floats), riff(pcm(32, 4, tag=3), floats)):
        assert np.array_equal(samples(data) * 32768, TONE)
    monkeypatch.setitem(sys.modules, "soundfile", None)  # PCM needs none
    for data in (riff(extensible(1, 24), fine), riff(pcm(24, 3), fine), riff(pcm(), TONE.tobytes())):
        assert np.array_equal(samples(data) * 32768, TONE)


@pytest.mark.parametrize(
    ("bits", "block", "channels"),
    [(24, 4, 1), (16, 4, 1), (16, 2, 2), (16, 0, 1), (8, 2, 1), (0, 2, 1), (64, 8, 1), (16, 2, 0)],
)
def test_headers_that_contradict_themselves_are_refused(bits: int, block: int, channels: int) -> None:
    """Read as they stand they would be noise."""
    with pytest.raises(DamagedError, match="a damaged WAV file: "):
        read("x.wav", riff(pcm(bits, block, channels), bytes(480)))


def test_big_endian_wav_and_sphere() -> None:
    big = riff(pcm(order=">"), TONE.astype(">i2").tobytes(), ">")
    floats = riff(pcm(32, 4, order=">", tag=3), (TONE / 32768).astype(">f4").tobytes(), ">")
    streamed = riff(pcm(order=">"), TONE.astype(">i2").tobytes(), ">", 0xFFFFFFFF, 0xFFFFFFFF)
    for data in (big, floats, streamed, written("NIST", "PCM_16")):
        assert np.array_equal(samples(data) * 32768, TONE)


@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 44100])
def test_mp3_without_a_tag(rate: int) -> None:
    """Below 16 kHz its frames begin otherwise."""
    data = written("MP3", "MPEG_LAYER_III", rate)
    assert data[0] == 0xFF
    found_rate, found = read("x", data)
    assert found_rate == rate and equals(found[:, 0], 0.9)


def without_count(flac: bytes) -> bytes:
    """As encoders write into a pipe: the 36 bits of STREAMINFO for the number of samples are 0."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def test_flac_without_a_count_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written("FLAC", "PCM_16")
    assert np.array_equal(samples(without_count(whole)) * 32768, TONE)
    monkeypatch.setattr(sound, "_BLOCK", 1000)
    assert np.array_equal(samples(without_count(whole)) * 32768, TONE)
    monkeypatch.setattr(sound, "_LONGEST", 2500)
    with pytest.raises(DamagedError, match="3000 samples, more than 2500"):
        read("x.flac", without_count(whole))


def test_a_folder_of_all_of_them_is_packed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for form, subtype in FORMS:
        (source / f"{form}-{subtype}.{form.lower()}").write_bytes(written(form, subtype))
    (source / "stream.flac").write_bytes(without_count(written("FLAC", "PCM_16")))
    assert cli(["data", "pack", str(source), "-o", str(tmp_path / "p"), "--as", "audio:8k", "--strict"]) == 0
    assert capfd.readouterr().out.startswith(f"{len(FORMS) + 1} files")


TOOLS = {
    "ffmpeg": [
        f"ffmpeg -v error -i - -c:a {codec} -f {form} -"
        for codec, form in (
            ("pcm_s16le", "wav"), ("pcm_s24le", "wav"), ("pcm_f32le", "wav"), ("flac", "flac"), ("pcm_s16be", "aiff"),
            ("pcm_s24be", "aiff"), ("pcm_s16be", "au"), ("pcm_mulaw", "wav"), ("adpcm_ima_wav", "wav"),
        )
    ],
    "sox": [
        f"sox -t wav - -t {form} -"
        for form in ("wav", "wav -b 24", "wav -e float -b 32", "wav -B", "aiff", "aiff -b 24", "au", "sph")
    ],
    "flac": ["flac --silent -c -"],
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_what_tools_write_into_a_pipe(tool: str, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool} here")
    (tmp_path / "tone.wav").write_bytes(written("WAV", "PCM_16"))
    for line in TOOLS[tool]:
        words = ["sh", "-c", f"cat tone.wav | {line} | cat"]  # no length is known beforehand, and none can be filled in
        data = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True).stdout
        assert equals(samples(data), 0.9), line


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="there is no espeak-ng here")
def test_what_a_voice_says_into_a_pipe() -> None:
    data = subprocess.run(["espeak-ng", "--stdout", "bytes"], capture_output=True, check=True).stdout
    assert len(read("x.wav", data)[1]) > 5000


def test_text_is_no_sound() -> None:
    for data in (b"", b"text", "\ufefftext".encode("utf-16"), b"\xff\xd8\xff\xe0 JPEG"):
        with pytest.raises(UnfitError, match="not a sound file"):
            read("x", data)
