"""Pictures and sound in the report: originals, completions of their beginnings, and unconditional samples.

All is inside the page: PNG and WAV as base64, waveforms as SVG.
"""

from __future__ import annotations

import io
import wave
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytelm.data.modalities.base import Modality
from bytelm.report.markup import escape, rendered

WIDTH, HEIGHT = 480, 72  # of a wave
QUIET = 1e-3  # of the full scale: peaks below this are not scaled up


@dataclass(frozen=True)
class Completion:
    """A document, how many of its bytes were the prompt, and what the model generated after these."""

    original: bytes
    given: int
    added: bytes

    @property
    def prompt(self) -> bytes:
        """The prompt."""
        return self.original[: self.given]


@dataclass(frozen=True)
class Media:
    """Documents of a split that are no text, what the model made of their beginnings, and samples without a prompt."""

    modality: Modality
    completions: Sequence[Completion] = ()
    free: Sequence[bytes] = ()
    split: str = "test"
    note: str = ""


class Row(NamedTuple):
    """Pictures side by side, as PNG in base64."""

    name: str
    caption: str
    images: list[str]


class Sound(NamedTuple):
    """The waveform as SVG, and the WAV file in base64."""

    wave: str
    file: str
    caption: str


def gallery(media: Media) -> str:
    """HTML of all of it; empty if there is nothing."""
    pictures = list(_pictures(media)) if media.modality.suffix == ".png" else []
    sounds = list(_sounds(media)) if media.modality.suffix == ".wav" else []
    return rendered("media.html", note=media.note, pictures=pictures, sounds=sounds).strip()


def _pictures(media: Media) -> Iterator[Row]:
    """Rows of pictures: each original is above its prompt and its completion."""
    done = media.completions
    rows = [
        ("original", f"Originals from the {media.split} split.", [c.original for c in done]),
        ("given", "Prompts: the part that the model was given.", [c.prompt for c in done]),
        ("completed", "Completions.", [c.prompt + c.added for c in done]),
        ("free", "Unconditional samples (no prompt).", media.free),
    ]
    for name, caption, documents in rows:
        if documents:
            yield Row(name, caption, [_encoded(media, document) for document in documents])


def _sounds(media: Media) -> Iterator[Sound]:
    """Each original beside its completion, in which the generated part has another colour."""
    for number, done in enumerate(media.completions, 1):
        completed = done.prompt + done.added
        loudest = max(_peak(media, document) for document in (done.original, completed))
        yield _sound(media, f"Original {number}, from the {media.split} split.", done.original, None, loudest)
        words = f"Completion {number}: the generated part has the second colour."
        yield _sound(media, words, completed, done.given, loudest)
    for number, document in enumerate(media.free, 1):
        yield _sound(media, f"Unconditional sample {number} (no prompt).", document, 0, _peak(media, document))


def _encoded(media: Media, document: bytes) -> str:
    return b64encode(media.modality.decode(document)).decode()


def _sound(media: Media, caption: str, document: bytes, given: int | None, loudest: float) -> Sound:
    """A clip; bytes from `given` on were generated."""
    levels, rate = _levels(media.modality.decode(document))
    own = 1.0 if given is None or not document else given / len(document)
    caption = f"{caption} {len(levels) / rate:.2f} seconds."
    return Sound(_wave(levels / loudest, own, caption), _encoded(media, document), caption)


def _wave(levels: NDArray[np.float64], own: float, title: str) -> str:
    """The lowest and highest of the levels (-1 to 1) at each pixel, the first share `own` in the first colour."""
    columns = min(WIDTH, len(levels))
    step = WIDTH / max(1, columns)
    strokes: list[tuple[bool, str]] = []
    for number in range(columns):
        first, end = (len(levels) * n // columns for n in (number, number + 1))
        column = levels[first : end + 1]  # with the first of the next, so that the line does not break
        low, high = (HEIGHT * (0.5 - 0.48 * float(level)) for level in (column.min(), column.max()))
        added = number >= round(own * columns)
        strokes.append((added, f"M{(number + 0.5) * step:.1f} {high:.1f}v{max(low - high, 1.0):.1f}"))
    paths = "".join(
        f'<path fill="none" stroke="var(--series{int(added)})" stroke-width="{max(1.0, step):.1f}" '
        f'd="{"".join(stroke for _, stroke in group)}"/>'
        for added, group in groupby(strokes, lambda stroke: stroke[0])
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>{paths}</svg>'


def _peak(media: Media, document: bytes) -> float:
    """The peak level, to which a waveform is scaled so that quiet speech can be seen."""
    levels, _ = _levels(media.modality.decode(document))
    return max(float(np.abs(levels).max(initial=0.0)), QUIET)


def _levels(file: bytes) -> tuple[NDArray[np.float64], int]:
    """The samples of a WAV file, one channel of 8 or 16 bits, from -1 to 1 `[frames]`, and how many a second."""
    with wave.open(io.BytesIO(file)) as sound:
        width, rate, frames = sound.getsampwidth(), sound.getframerate(), sound.readframes(sound.getnframes())
    if width == 1:
        levels = np.frombuffer(frames, np.uint8).astype(np.float64) / 128 - 1
    else:
        levels = np.frombuffer(frames, "<i2").astype(np.float64) / 32768
    return levels, rate
