"""Sound files as tools write them: into pipes, in telephone formats, with headers that say too much or too little."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import tracemalloc
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from bytelm.data import sounds
from bytelm.data.modalities import audio
from bytelm.data.modalities.base import DamagedError, UnfitError
from bytelm.data.pack import pack

RATE = 16000
AUDIO = audio.Config(RATE).build()
CLIP = np.random.default_rng(1).integers(-(1 << 15), 1 << 15, 2000).astype("<i2")
TONE = np.rint(9000 * np.sin(np.arange(8000) / 7)).astype("<i2")
PLACEHOLDERS = [0, 0x77359400, 0x7FFFF000, 0x7FFFFFDB, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]


def read(data: bytes, rate: int = RATE) -> bytes:
    (document,) = audio.Config(rate).build().encode("x.wav", data, Counter())
    return document


def riff(form: bytes, pcm: bytes, size: int | None = None, whole: int | None = None, after: bytes = b"") -> bytes:
    """A WAV file; `size` and `whole` are what its header says of the samples and of itself, the truth unless given."""
    size, whole = len(pcm) if size is None else size, 28 + len(form) - 8 + len(pcm + after) if whole is None else whole
    head = struct.pack("<4sI4s4sI", b"RIFF", whole, b"WAVE", b"fmt ", len(form))
    return head + form + struct.pack("<4sI", b"data", size) + pcm + after


def form(tag: int, bits: int, block: int | None = None, channels: int = 1, extended: bool = False) -> bytes:
    block = channels * bits // 8 if block is None else block
    start = struct.pack("<HHIIHH", 0xFFFE if extended else tag, channels, RATE, RATE * block, block, bits)
    guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
    return start + struct.pack("<HHI", 22, bits, 4) + guid if extended else start


def written(samples: NDArray[Any], kind: str, subtype: str, rate: int = RATE, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=kind, **options)
    return file.getvalue()


def three(samples: NDArray[np.int16]) -> bytes:
    """The samples in 24 bits."""
    return b"".join(b"\0" + sample.tobytes() for sample in samples)


SHAPES = {
    "16 bits": (form(1, 16), CLIP.tobytes()),
    "24 bits": (form(1, 24), three(CLIP)),
    "24 bits, extensible": (form(1, 24, extended=True), three(CLIP)),
    "float": (form(3, 32), (CLIP / 32768).astype("<f4").tobytes()),
    "float, extensible": (form(3, 32, extended=True), (CLIP / 32768).astype("<f4").tobytes()),
    "double": (form(3, 64), (CLIP / 32768).tobytes()),
}


# --- telephone formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("AIFF", "GSM610"), ("AU", "G721_32"), ("AU", "G723_24"), ("AU", "G723_40")]
    + [("WAV", f"NMS_ADPCM_{bits}") for bits in (16, 24, 32)]
    + [("WAV", kind) for kind in ("GSM610", "G721_32", "IMA_ADPCM", "MS_ADPCM")],
)
def test_formats_of_telephones_are_read_to_the_end(kind: str, subtype: str) -> None:
    found = np.frombuffer(read(written(TONE, kind, subtype)), "<i2")
    assert len(TONE) <= len(found) < len(TONE) + 400  # whole blocks
    assert max(np.corrcoef(found[at : at + 7500], TONE[:7500])[0, 1] for at in range(300)) > 0.8


def test_such_a_clip_does_not_end_a_pack(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "gsm.wav").write_bytes(written(np.zeros(8000), "WAV", "GSM610", 8000))
    (tmp_path / "s" / "pcm.wav").write_bytes(riff(*SHAPES["16 bits"]))
    corpus = pack([tmp_path / "s"], tmp_path / "p", modality=AUDIO)
    assert corpus.source_report.bad == 0 and corpus.total > 2 * len(CLIP) + 2 * 2 * 8000


# --- sizes that a pipe leaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", PLACEHOLDERS)
def test_a_size_that_no_file_has_is_to_the_end(shape: str, size: int) -> None:
    for whole in (0, 36, size, (size + 36) % (1 << 32), 0xFFFFFFFF):
        assert read(riff(*SHAPES[shape], size, whole)) == CLIP.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_true_size_is_kept_to(shape: str) -> None:
    list_chunk = struct.pack("<4sI4s", b"LIST", 4, b"INFO")
    assert read(riff(*SHAPES[shape], after=list_chunk)) == CLIP.tobytes()
    whole = riff(*SHAPES[shape])
    for cut in (whole[:-8], whole[: len(whole) // 2]):
        with pytest.raises(DamagedError, match=r"ends after \d+ of 2000 samples"):
            read(cut)
    assert read(riff(SHAPES[shape][0], b"", after=list_chunk)) == b""  # an empty clip, and no noise made of its notes


def test_rf64_of_a_pipe_is_read_and_half_of_one_is_not() -> None:
    def rf64(whole: int, size: int, pcm: bytes) -> bytes:
        ds64 = struct.pack("<4sIQQQI", b"ds64", 28, whole, size, size // 2, 0)
        head = struct.pack("<4sI4s", b"RF64", 0xFFFFFFFF, b"WAVE") + ds64 + struct.pack("<4sI", b"fmt ", 16)
        return head + form(1, 16) + struct.pack("<4sI", b"data", 0xFFFFFFFF) + pcm

    pcm = CLIP.tobytes()
    assert read(rf64(72 + len(pcm), len(pcm), pcm)) == pcm == read(rf64(0, 0, pcm))
    with pytest.raises(DamagedError, match="ends after 1000 of 2000 samples"):
        read(rf64(72 + len(pcm), len(pcm), pcm[:2000]))


@pytest.mark.parametrize("size", [0, 0x7F000050, 0xFFFFFFFF])
def test_aiff_of_a_pipe(size: int) -> None:
    whole = written(CLIP, "AIFF", "PCM_16")
    assert read(whole[:4] + size.to_bytes(4, "big") + whole[8:]) == CLIP.tobytes()


def test_flac_without_a_count_is_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    long = np.tile(CLIP, 5)
    whole = bytearray(written(long, "FLAC", "PCM_16"))
    whole[21:26] = bytes([whole[21] & 0xF0, 0, 0, 0, 0])  # 36 bits of STREAMINFO
    assert soundfile.SoundFile(io.BytesIO(whole)).frames > 1 << 62
    for piece in (999, 1 << 18):
        monkeypatch.setattr(sounds, "_PIECE", piece)
        assert read(bytes(whole)) == long.tobytes()
    monkeypatch.setattr(sounds, "_LONGEST", 9999)
    with pytest.raises(DamagedError, match="samples, more than 9999: split it"):
        read(bytes(whole))


TOOLS = {
    "ffmpeg wav": "ffmpeg -v error -i {} -f wav -",
    "ffmpeg float": "ffmpeg -v error -i {} -c:a pcm_f32le -f wav -",
    "ffmpeg 24 bits": "ffmpeg -v error -i {} -c:a pcm_s24le -f wav -",
    "ffmpeg aiff": "ffmpeg -v error -i {} -f aiff -",
    "ffmpeg au": "ffmpeg -v error -i {} -f au -",
    "ffmpeg rf64": "ffmpeg -v error -i {} -rf64 always -f wav -",
    "ffmpeg flac": "ffmpeg -v error -i {} -f flac -",
    "flac": "flac -s -c {}",
    "sox wav": "sox -V1 {} -t wav -",
    "sox sph": "sox -V1 {} -t sph -",
    "sox aiff": "sox -V1 {} -t aiff -",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_tools_write_into_a_pipe(tool: str, tmp_path: Path) -> None:
    words = TOOLS[tool].format(tmp_path / "x.wav").split()
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    (tmp_path / "x.wav").write_bytes(riff(*SHAPES["16 bits"]))
    piped = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout
    assert read(piped) == CLIP.tobytes()


def test_speech_of_espeak_is_read() -> None:
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    piped = subprocess.run(["espeak-ng", "--stdout", "hello"], capture_output=True, check=True).stdout
    assert read(piped, 22050) == piped[44:]


# --- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_format_tag_decides_whatever_the_standard_library_says(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise wave.Error("worded anew in every Python")

    monkeypatch.setattr(wave, "open", refuse)
    assert read(riff(*SHAPES[shape])) == CLIP.tobytes()


@pytest.mark.parametrize(
    ("tag", "bits", "block", "channels"),
    [(1, 24, 4, 1), (1, 24, 8, 2), (1, 16, 2, 2), (1, 16, 0, 1), (1, 8, 2, 1), (3, 32, 8, 1)],
)
@pytest.mark.parametrize("extended", [False, True])
def test_a_header_that_contradicts_itself_is_refused(
    tag: int, bits: int, block: int, channels: int, extended: bool
) -> None:
    with pytest.raises(DamagedError, match=rf"contradicts itself \({bits} bits per sample"):
        read(riff(form(tag, bits, block, channels, extended), CLIP.tobytes()))


@pytest.mark.parametrize(("tag", "bits", "block"), [(1, 0, 0), (1, 33, 5), (3, 0, 0), (3, 16, 2), (3, 24, 3)])
def test_samples_of_no_size_are_refused(tag: int, bits: int, block: int) -> None:
    """Found by fuzzing: of 0 bits a header does not contradict itself, and nothing can be divided by its block."""
    with pytest.raises(DamagedError, match=f"samples of {bits} bits"):
        read(riff(form(tag, bits, block), CLIP.tobytes(), size=1 << 20))


def test_floats_of_any_size_are_cut_off() -> None:
    """Found by fuzzing: on the way to another rate the largest ones became infinite, and then anything."""
    loud = np.full(2000, 3e38, "<f4")
    for rate in (RATE, 8000):
        found = np.frombuffer(read(riff(form(3, 32), loud.tobytes()), rate), "<i2")
        assert (found[100:-100] == 32767).all()


def test_odd_bits_in_whole_bytes_are_read() -> None:
    assert read(riff(form(1, 20, 3), three(CLIP))) == read(riff(form(1, 12, 2), CLIP.tobytes())) == CLIP.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        riff(form(1, 16)[:14], b""),
        b"RIFF\x10\0\0\0WAVEdata\x04\0\0\0abcd",
        struct.pack("<4sI4s4sI", b"RF64", 0xFFFFFFFF, b"WAVE", b"ds64", 8) + bytes(8),
        b"RIFF\x10\0\0\0WAVE" + b"JUNK\0\0\0\0" * 20_000,
    ],
    ids=["short format", "no format", "short sizes", "only chunks"],
)
def test_headers_without_what_is_needed_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedError, match="damaged WAV file"):
        read(data)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_rifx_is_read(subtype: str) -> None:
    data = written(CLIP / 32768 if subtype == "FLOAT" else CLIP, "WAV", subtype, endian="BIG")
    assert data.startswith(b"RIFX") and read(data) == CLIP.tobytes()
    with pytest.raises(DamagedError, match="ends after"):
        read(data[:-100])


@pytest.mark.parametrize("kind", ["NIST", "AU"])
def test_sphere_and_au_are_read_and_what_ends_too_early_is_not(kind: str) -> None:
    data = written(CLIP, kind, "PCM_16")
    assert read(data) == CLIP.tobytes()
    with pytest.raises(DamagedError, match="a truncated audio file"):
        read(data[: len(data) // 2])


@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 22050, 44100])
def test_mp3_of_any_rate_needs_no_tag(rate: int) -> None:
    data = written(TONE, "MP3", "MPEG_LAYER_III", rate)
    if data.startswith(b"ID3"):
        data = data[10 + int.from_bytes(data[6:10], "big") :]
    assert data[0] == 0xFF
    found = np.frombuffer(read(data, rate), "<i2")
    assert max(np.corrcoef(found[at : at + 5000], TONE[:5000])[0, 1] for at in range(2000)) > 0.8


@pytest.mark.parametrize(
    "text", ["\ufeffhello".encode("utf-16-le"), b"\xff\xd8\xff\xe0\0\x10JFIF", b"\xff\xf1\x50\x80abc"]
)
def test_what_begins_a_little_like_mp3_is_no_sound(text: bytes) -> None:
    with pytest.raises(UnfitError, match="not an audio file"):
        read(text * 9)


def test_clips_without_samples_are_told(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x.wav").write_bytes(riff(*SHAPES["16 bits"]))
    (tmp_path / "s" / "y.wav").write_bytes(riff(form(1, 16), b"", 0xFFFFFFFF))
    corpus = pack([tmp_path / "s"], tmp_path / "p", modality=AUDIO)
    assert any("no audio data in it" in loss for loss in corpus.source_report.losses())


@pytest.mark.fault("D8")
def test_a_count_in_a_header_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a FLAC header claims to hold, 800 MB here, is not set aside before it is there."""
    monkeypatch.setattr(sounds, "_PIECE", 1 << 12)
    whole = bytearray(written(CLIP, "FLAC", "PCM_16"))
    whole[22:26] = (200_000_000).to_bytes(4, "big")
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="ends after 2000 of 200000000 samples"):
            read(bytes(whole))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
