"""Sound on one channel: PCM samples of 16 bits, low byte first, or of 8 bits, as the bytes of a WAV file have them.

WAV files of PCM, and headerless .s16le files at the rate of the configuration, are read by the standard library; float
WAV, FLAC, Ogg, MP3, AIFF and the like by soundfile. Channels are averaged; another rate is brought to the wanted one by
way of the spectrum, without what the lower of the two rates cannot hold; finer samples are rounded.
"""

from __future__ import annotations

import io
import math
import re
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.data.files import shown
from bytelm.data.formats import suffixes
from bytelm.data.modalities.base import DamagedError, Modality, UnfitError
from bytelm.errors import ConfigError, MissingExtraError

_RATES = (1000, 192000)  # Hz
_LONGEST = 1 << 28  # samples, of all channels together: 1 GiB while they are converted
_GUARD = 1 << 12  # samples of silence, so that the end of a clip does not ring into its beginning
# How files of sound begin that soundfile is asked about. Of all others it would have to guess.
_MP3 = (b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")
_MARKS = (b"RIFF", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", *_MP3)


@dataclass(frozen=True)
class Config:
    """`rate`: samples a second. `bits`: 16 (signed), or 8 (unsigned)."""

    rate: int = 16000
    bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        if not _RATES[0] <= self.rate <= _RATES[1]:
            raise ConfigError(
                f"modality.rate = {self.rate}: must be between {_RATES[0]} and {_RATES[1]} samples a second"
            )

    @classmethod
    def parse(cls, spec: str) -> dict[str, Any]:
        """Words between colons: 16k, 22.05k or 44100 (samples a second), 8bit or 16bit."""
        found: dict[str, Any] = {}
        for word in spec.split(":") if spec else []:
            if word in ("8bit", "16bit"):
                found["bits"] = int(word.removesuffix("bit"))
            elif rate := re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(k?)", word):
                found["rate"] = round(float(rate[1]) * (1000 if rate[2] else 1))
            else:
                raise ConfigError(f"{word!r} is none of 16k, 44100 (any number of samples a second), 8bit, 16bit")
        return found

    def build(self) -> Audio:
        """The modality of this configuration."""
        return Audio(self)


class Audio(Modality):
    """Every document is one clip."""

    suffix = ".wav"
    suffixes = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".s16le"})
    aligned = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.unit = config.bits // 8
        self.planes = ("low byte", "high byte") if config.bits == 16 else ()

    def encode(self, name: str, data: bytes, notes: Counter[str]) -> Iterator[bytes]:
        """One document a file, without a byte for a clip without a sample."""
        rate, clip = (self.config.rate, _s16le(data)) if suffixes(name)[0] == ".s16le" else _read(name, data)
        if len(clip) == 0:
            yield b""
            return
        if not _RATES[0] <= rate <= _RATES[1]:  # a file may claim any rate, and one far away takes long to resample
            raise DamagedError(f"{rate} samples a second, not from {_RATES[0]} to {_RATES[1]}")
        if (np.abs(clip) > 1).any():
            notes["clipped"] += 1
        if _is_finer(clip, self.config.bits):
            notes[f"rounded to {self.config.bits} bits"] += 1
        if clip.shape[1] > 1:
            notes["mixed down to mono"] += 1
        samples = clip.mean(1, dtype=np.float32)
        if rate != self.config.rate:
            notes[f"resampled to {self.config.rate} Hz"] += 1
            samples = resampled(samples, rate, self.config.rate)
        yield to_pcm(samples, self.unit)

    def decode(self, document: bytes) -> bytes:
        """A WAV file. Half a sample at the end is left out."""
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(self.unit)
            sound.setframerate(self.config.rate)
            sound.writeframes(self._whole(document))
        return file.getvalue()

    def compressors(self) -> dict[str, Callable[[bytes], int]]:
        """FLAC at its best; none without soundfile."""
        try:
            _soundfile("compressing")
        except MissingExtraError:
            return {}
        return {"flac": self._flac_size}

    def _flac_size(self, document: bytes) -> int:
        samples = np.frombuffer(self._whole(document), "<i2" if self.unit == 2 else "u1")
        if self.unit == 1:
            samples = (samples.astype(np.int16) - 128) << 8  # which soundfile takes the high byte of
        file = io.BytesIO()
        subtype = "PCM_16" if self.unit == 2 else "PCM_S8"
        _soundfile("compressing").write(
            file, samples.astype(np.int16), self.config.rate, subtype, format="FLAC", compression_level=1.0
        )
        return len(file.getvalue())

    def _whole(self, document: bytes) -> bytes:
        return document[: len(document) // self.unit * self.unit]


# --- samples between -1 and 1 ---------------------------------------------------------------------------------------


def from_pcm(data: bytes, width: int) -> NDArray[np.float32]:
    """Samples of `width` bytes (unsigned where it is 1), as WAV files have them: in [-1, 1), exact up to 24 bits."""
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw ^ 0x80 if width == 1 else raw
    return wide.view("<i4")[:, 0].astype(np.float32) / np.float32(1 << 31)


def to_pcm(samples: NDArray[np.float32], width: int) -> bytes:
    """The nearest samples of 1 or 2 bytes; what goes beyond them is clipped."""
    full = 1 << (8 * width - 1)
    with np.errstate(over="ignore"):
        whole = np.clip(np.rint(samples * full), -full, full - 1)
    return (whole.astype("<i2") if width == 2 else (whole + full).astype(np.uint8)).tobytes()


def resampled(samples: NDArray[np.float32], old: int, new: int) -> NDArray[np.float32]:
    """The same sound at another rate, without what lies above half the lower of the two. Raises DamagedError."""
    up, down = new // math.gcd(old, new), old // math.gcd(old, new)
    steps = -(-(len(samples) + _GUARD) // down)  # so that a whole number of samples becomes a whole number
    _check_length(steps * max(up, down))  # a file may claim any rate
    spectrum = np.fft.rfft(samples, steps * down)  # which irfft cuts off, or goes on with zeros
    wanted = -(-len(samples) * up // down)
    return (np.fft.irfft(spectrum, steps * up)[:wanted] * (up / down)).astype(np.float32)


def _is_finer(clip: NDArray[np.float32], bits: int) -> bool:
    with np.errstate(over="ignore"):  # what is far out of range is clipped later
        scaled = clip * np.float32(1 << (bits - 1))
    return bool((scaled != np.rint(scaled)).any())


# --- files: the rate and the samples, float32 `[frames, channels]` --------------------------------------------------


def _s16le(data: bytes) -> NDArray[np.float32]:
    if len(data) % 2:
        raise DamagedError("an odd number of bytes, which are no samples of 16 bits")
    _check_length(len(data) // 2)
    return from_pcm(data, 2)[:, None]


def _read(name: str, data: bytes) -> tuple[int, NDArray[np.float32]]:
    if not data.startswith(_MARKS):
        raise UnfitError("not a sound file")
    if data.startswith(b"RIFF"):
        try:
            return _wave(data)
        except (EOFError, RuntimeError):  # the latter where a part claims to end after the file
            raise DamagedError("a WAV file that ends in its header") from None
        except wave.Error as error:
            if not str(error).startswith("unknown format"):
                raise DamagedError(f"a damaged WAV file: {error}") from None
    return _other(name, data)


def _wave(data: bytes) -> tuple[int, NDArray[np.float32]]:
    """A WAV file of PCM; wave.Error for one of another kind."""
    with wave.open(io.BytesIO(data)) as file:
        rate, frames, channels, width = file.getframerate(), file.getnframes(), file.getnchannels(), file.getsampwidth()
        if rate < 1 or width > 4:
            raise DamagedError(f"a damaged WAV file: {rate} samples of {8 * width} bits a second")
        pcm = file.readframes(frames)
    found = len(pcm) // (width * channels)
    if found < frames:
        raise DamagedError(f"a WAV file that ends after {found} of {frames} samples")
    _check_length(frames * channels)
    return rate, from_pcm(pcm, width).reshape(-1, channels)


def _other(name: str, data: bytes) -> tuple[int, NDArray[np.float32]]:
    """Any other file, through soundfile."""
    soundfile = _soundfile(f"reading {shown(name)}")
    promised = int.from_bytes(data[4:8], "big" if data.startswith(b"FORM") else "little") + 8
    if data.startswith((b"RIFF", b"FORM")) and promised > len(data) + 1:  # some count a byte of padding too many
        raise DamagedError("a sound file that ends too early")  # soundfile would take what there is for the whole
    try:
        with soundfile.SoundFile(_Seekable(data)) as file:
            _check_length(file.frames * file.channels)
            rate, samples = file.samplerate, file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise DamagedError(f"a damaged or unknown sound file: {error.error_string}") from None
    if not np.isfinite(samples).all():
        raise DamagedError("samples that are not finite")
    return rate, samples


class _Seekable(io.BytesIO):
    """Bytes in which a place before the beginning is the beginning: the library would print what is raised there."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: len(self.getbuffer())}[whence]
        return super().seek(max(start + offset, 0))


def _check_length(samples: int) -> None:
    if samples > _LONGEST:
        raise DamagedError(f"{samples} samples, more than {_LONGEST}: cut it into parts")


def _soundfile(purpose: str) -> Any:
    """The package. Raises MissingExtraError without it, or without the library that it binds."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise MissingExtraError("soundfile", "media", purpose) from error
    return soundfile
