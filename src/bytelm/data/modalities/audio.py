"""Mono audio: PCM samples of 16 bits, little-endian, or of 8 bits, as in a WAV file.

WAV files of PCM, and headerless .s16le files at the rate of the configuration, are read without a library; float WAV,
GSM and ADPCM, FLAC, Ogg, MP3, AIFF, SPHERE and the like by soundfile. Channels are averaged; another rate is brought to
the wanted one by way of the spectrum, without what the lower of the two rates cannot hold; finer samples are rounded.
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

from bytelm.data.formats import suffixes
from bytelm.data.modalities.base import DamagedError, Modality
from bytelm.data.sounds import check_length, from_pcm, samples_in, soundfile
from bytelm.errors import ConfigError, MissingExtraError

_RATES = (1000, 192000)  # Hz
_LOUDEST = 1 << 20  # times full scale, from where on a float file is cut off, so that sums of samples stay finite
_GUARD = 1 << 12  # samples of silence, so that the end of a clip does not ring into its beginning


@dataclass(frozen=True)
class Config:
    """`rate`: samples a second. `bits`: 16 (signed), or 8 (unsigned)."""

    rate: int = 16000
    bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        if not _RATES[0] <= self.rate <= _RATES[1]:
            raise ConfigError(
                f"modality.rate = {self.rate}: must be between {_RATES[0]} and {_RATES[1]} samples per second"
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
                raise ConfigError(f"{word!r} is none of 16k, 44100 (any number of samples per second), 8bit, 16bit")
        return found

    def build(self) -> Audio:
        """The modality of this configuration."""
        return Audio(self)


class Audio(Modality):
    """Every document is one clip."""

    suffix = ".wav"
    suffixes = frozenset(
        {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".s16le"}
        | {".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".sph"}
    )
    aligned = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.unit = config.bits // 8
        self.planes = ("low byte", "high byte") if config.bits == 16 else ()

    def encode(self, name: str, data: bytes, notes: Counter[str]) -> Iterator[bytes]:
        """One document a file, without a byte for a clip without a sample."""
        rate, clip = (self.config.rate, _s16le(data)) if suffixes(name)[0] == ".s16le" else samples_in(name, data)
        if len(clip) == 0:
            yield b""
            return
        if not _RATES[0] <= rate <= _RATES[1]:  # a file may claim any rate, and one far away takes long to resample
            raise DamagedError(f"{rate} samples per second, not from {_RATES[0]} to {_RATES[1]}")
        if (np.abs(clip) > 1).any():
            notes["clipped"] += 1
            clip = clip.clip(-_LOUDEST, _LOUDEST)
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
        """A WAV file. Half a sample at the end is dropped."""
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
            soundfile("compressing")
        except MissingExtraError:
            return {}
        return {"flac": self._flac_size}

    def _flac_size(self, document: bytes) -> int:
        samples = np.frombuffer(self._whole(document), "<i2" if self.unit == 2 else "u1")
        if self.unit == 1:
            samples = (samples.astype(np.int16) - 128) << 8  # which soundfile takes the high byte of
        file = io.BytesIO()
        subtype = "PCM_16" if self.unit == 2 else "PCM_S8"
        soundfile("compressing").write(
            file, samples.astype(np.int16), self.config.rate, subtype, format="FLAC", compression_level=1.0
        )
        return len(file.getvalue())

    def _whole(self, document: bytes) -> bytes:
        return document[: len(document) // self.unit * self.unit]


# --- samples between -1 and 1 ---------------------------------------------------------------------------------------


def to_pcm(samples: NDArray[np.float32], width: int) -> bytes:
    """The nearest samples of 1 or 2 bytes; what goes beyond them is clipped."""
    full = 1 << (8 * width - 1)
    with np.errstate(over="ignore"):
        whole = np.clip(np.rint(samples * full), -full, full - 1)
    return (whole.astype("<i2") if width == 2 else (whole + full).astype(np.uint8)).tobytes()


def resampled(samples: NDArray[np.float32], old: int, new: int) -> NDArray[np.float32]:
    """The same audio at another sample rate, without aliasing. Raises DamagedError."""
    up, down = new // math.gcd(old, new), old // math.gcd(old, new)
    steps = -(-(len(samples) + _GUARD) // down)  # so that a whole number of samples becomes a whole number
    check_length(steps * max(up, down))  # a file may claim any rate
    spectrum = np.fft.rfft(samples, steps * down)  # which irfft truncates, or pads with zeros
    wanted = -(-len(samples) * up // down)
    return (np.fft.irfft(spectrum, steps * up)[:wanted] * (up / down)).astype(np.float32)


def _is_finer(clip: NDArray[np.float32], bits: int) -> bool:
    with np.errstate(over="ignore"):  # what is far out of range is clipped later
        scaled = clip * np.float32(1 << (bits - 1))
    return bool((scaled != np.rint(scaled)).any())


def _s16le(data: bytes) -> NDArray[np.float32]:
    if len(data) % 2:
        raise DamagedError("an odd number of bytes, not 16-bit samples")
    check_length(len(data) // 2)
    return from_pcm(data, 2)[:, None]
