"""Files of images and sound, and folders of them."""

from __future__ import annotations

import io
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from bytelm.data.modalities import audio, image
from bytelm.data.modalities.base import Modality

RANDOM = np.random.default_rng(0)


def encoded(modality: Modality, data: bytes, name: str = "file") -> tuple[list[bytes], dict[str, int]]:
    notes: Counter[str] = Counter()
    return list(modality.encode(name, data, notes)), dict(notes)


def one(modality: Modality, data: bytes, name: str = "file") -> tuple[bytes, dict[str, int]]:
    (document,), notes = encoded(modality, data, name)
    return document, notes


def picture(pixels: NDArray[Any], form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def raster(width: int, height: int, grey: bool = False) -> Modality:
    return image.Config(width, height, grey, block=1).build()


def saved(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


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


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path
