"""Sound files as samples. PCM in WAV is read here, everything else by soundfile, which only then has to be there.

What a program writes into a pipe has no true sizes in its header, as the header is gone when the end comes: ffmpeg,
sox, espeak-ng and speech services write one that no file has, or 0. Such a size says "to the end".
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.data.files import shown
from bytelm.data.modalities.base import LARGEST, DamagedError, UnfitError
from bytelm.errors import MissingExtraError

_LONGEST = 1 << 28  # samples, of all channels together: 1 GiB while they are converted
_BLOCK = 1 << 16  # frames that soundfile is asked for at a time
_UNKNOWN = 1 << 62  # frames, from which on libsndfile means that the header does not say
_PCM, _EXTENSIBLE = 1, 0xFFFE  # format tags of WAV
_EXTENDED = bytes.fromhex("000000001000800000aa00389b71")  # what follows a format tag that is written as a GUID
# How files of sound begin that soundfile is asked about. Of all others it would have to guess. Without an ID3 tag an
# MP3 begins with the first bits of a frame: MPEG 1, 2 or 2.5 (below 16 kHz), layer III, with or without a checksum.
_MP3 = (b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2")
_MARKS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"NIST_1A", *_MP3)


def read(name: str, data: bytes) -> tuple[int, NDArray[np.float32]]:
    """Frames a second, and the samples `[frames, channels]`, in [-1, 1] unless a float file goes beyond.

    Raises UnfitError for what is no sound file, DamagedError for one that is cut short, contradicts itself or is too
    long, and MissingExtraError where soundfile is needed and not installed.
    """
    if not data.startswith(_MARKS):
        raise UnfitError("not a sound file")
    if data.startswith((b"RIFF", b"RIFX")):
        wave = Wave.of(data)
        if wave.tag == _PCM:
            return wave.rate, wave.samples(data)
        data = wave.with_sizes(data)
    elif data.startswith(b"FORM"):  # soundfile would take what there is of a file that is cut short for the whole
        promised = int.from_bytes(data[4:8], "big") + 8
        if len(data) + 1 < promised < LARGEST:  # some count a byte of padding too many
            raise DamagedError("a sound file that ends too early")
    return _other(name, data)


def from_pcm(data: bytes, width: int, order: Literal["little", "big"] = "little") -> NDArray[np.float32]:
    """Samples of `width` bytes (unsigned where it is 1), as WAV files have them: in [-1, 1), exact up to 24 bits."""
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw ^ 0x80 if width == 1 else raw[:, :: 1 if order == "little" else -1]
    return wide.view("<i4")[:, 0].astype(np.float32) / np.float32(1 << 31)


def check_length(samples: int) -> None:
    """Raises DamagedError for more samples, of all channels together, than are held in memory."""
    if samples > _LONGEST:
        raise DamagedError(f"{samples} samples, more than {_LONGEST}: cut it into parts")


def soundfile(purpose: str) -> Any:
    """The package. Raises MissingExtraError without it, or without the library that it binds."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise MissingExtraError("soundfile", "media", purpose) from error
    return soundfile


@dataclass(frozen=True)
class Wave:
    """What the header of a WAV file says."""

    order: Literal["little", "big"]
    """Of bytes: big in RIFX, the rare sibling of RIFF."""
    tag: int
    """The format: 1 is PCM. Of WAVE_FORMAT_EXTENSIBLE the one that is written in its GUID, where it is such a one."""
    channels: int
    rate: int
    block: int
    """Bytes of a frame, or of a block of compressed ones."""
    bits: int
    start: int
    """Where the samples start."""
    size: int
    """Their bytes that are in the file."""
    streamed: bool
    """Whether the size in the header is none: larger than any file that is read, or 0 with no true size of the file."""

    @classmethod
    def of(cls, data: bytes) -> Wave:
        """The header of a file. Raises DamagedError where it ends in it, or before its samples do."""
        order: Literal["little", "big"] = "big" if data.startswith(b"RIFX") else "little"
        ends = DamagedError("a WAV file that ends in its header")
        if len(data) < 12:
            raise ends
        if data[8:12] != b"WAVE":
            raise DamagedError("a damaged WAV file: WAVE is not in its header")
        riff, at, form = int.from_bytes(data[4:8], order), 12, b""
        while at + 8 <= len(data):
            kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], order)
            at += 8
            if kind == b"data" and form:
                tag, channels, rate, block, bits = _format(form, order)
                left, honest = len(data) - at, riff + 7 <= len(data) <= riff + 9
                streamed = size >= LARGEST or (size == 0 and left > 0 and not honest)
                if size > left and not streamed:
                    unit = max(block, 1)
                    raise DamagedError(f"a WAV file that ends after {left // unit} of {size // unit} samples")
                return cls(order, tag, channels, rate, block, bits, at, left if streamed else size, streamed)
            if kind == b"fmt ":
                form = data[at : at + size]
                if not 16 <= size <= len(data) - at:
                    raise ends
            at += size + size % 2
        raise ends

    def samples(self, data: bytes) -> NDArray[np.float32]:
        """Those of PCM, `[frames, channels]`. Raises DamagedError where the header contradicts itself."""
        width = (self.bits + 7) // 8
        if self.rate < 1 or not 1 <= width <= 4 or self.channels < 1:
            what = f"{self.rate} samples of {self.bits} bits a second on {self.channels} channels"
            raise DamagedError(f"a damaged WAV file: {what}")
        if self.block != width * self.channels:
            what = f"{self.channels} samples of {self.bits} bits in blocks of {self.block} bytes"
            raise DamagedError(f"a damaged WAV file: {what}, not {width * self.channels}")
        frames = self.size // self.block
        check_length(frames * self.channels)
        pcm = data[self.start : self.start + frames * self.block]
        return from_pcm(pcm, width, self.order).reshape(-1, self.channels)

    def with_sizes(self, data: bytes) -> bytes:
        """The file with true sizes in its header, which soundfile would otherwise guess, not always rightly."""
        if not self.streamed:
            return data
        end = self.start + self.size
        size, riff = (number.to_bytes(4, self.order) for number in (self.size, end - 8))
        return b"".join((data[:4], riff, data[8 : self.start - 4], size, data[self.start : end]))


def _format(form: bytes, order: Literal["little", "big"]) -> tuple[int, int, int, int, int]:
    """Tag, channels, rate, block and bits of the part that describes the samples."""
    mark = "<" if order == "little" else ">"
    tag, channels, rate, _, block, bits = struct.unpack(mark + "HHIIHH", form[:16])
    if tag == _EXTENSIBLE and form[26:40] == _EXTENDED:
        (tag,) = struct.unpack(mark + "H", form[24:26])
    return tag, channels, rate, block, bits


def _other(name: str, data: bytes) -> tuple[int, NDArray[np.float32]]:
    """Any other file, through soundfile."""
    package = soundfile(f"reading {shown(name)}")

    class Stream(package.SoundFile):
        """Read from its beginning to its end, as some formats can, and some files whose headers have no length."""

        def seekable(self) -> bool:
            return False

    parts: list[NDArray[np.float32]] = []
    try:
        with Stream(_Seekable(data)) as file:
            rate, channels, frames = file.samplerate, file.channels, 0
            if file.frames < _UNKNOWN:
                check_length(file.frames * channels)
            while not parts or len(parts[-1]) == _BLOCK:
                parts.append(file.read(_BLOCK, dtype="float32", always_2d=True))
                frames += len(parts[-1])
                check_length(frames * channels)
    except package.LibsndfileError as error:
        raise DamagedError(f"a damaged or unknown sound file: {error.error_string}") from None
    samples = np.concatenate(parts)
    if not np.isfinite(samples).all():
        raise DamagedError("samples that are not finite")
    return rate, samples


class _Seekable(io.BytesIO):
    """Bytes in which a place before the beginning is the beginning: the library would print what is raised there."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: len(self.getbuffer())}[whence]
        return super().seek(max(start + offset, 0))
