"""Pictures and sound in the report: documents, what the model made of their beginnings, and free samples.

All is inside the page: PNG and WAV as base64, the shape of a sound as SVG.
"""

from __future__ import annotations

import io
import wave
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from bytelm.data.modalities.base import Modality
from bytelm.report.style import escape

WIDTH, HEIGHT = 480, 72  # of a wave
QUIET = 1e-3  # of the full scale: the loudest that is drawn no larger than it is


@dataclass(frozen=True)
class Completion:
    """A document, how many bytes of it the model was given, and what it added to these."""

    original: bytes
    given: int
    added: bytes

    @property
    def prompt(self) -> bytes:
        """What was given."""
        return self.original[: self.given]


@dataclass(frozen=True)
class Media:
    """What a run whose documents are no text shows of them: those of a split, and what the model made.

    `note` is the sentence above.
    """

    modality: Modality
    completions: Sequence[Completion] = ()
    free: Sequence[bytes] = ()
    split: str = "test"
    note: str = ""


def gallery(media: Media) -> str:
    """HTML of all of it; empty if there is nothing."""
    show = _GALLERIES.get(media.modality.suffix)
    note = f'<p class="note">{escape(media.note)}</p>' if media.note else ""
    return "\n".join(part for part in (note, *(show(media) if show else ())) if part)


def _pictures(media: Media) -> Iterator[str]:
    """Rows of pictures, so that each original stands above what was given of it and what became of that."""
    done = media.completions
    rows = [
        ("original", f"From the {escape(media.split)} documents.", [c.original for c in done]),
        ("given", "What the model was given of each.", [c.prompt for c in done]),
        ("completed", "Completed by the model.", [c.prompt + c.added for c in done]),
        ("free", "Free samples: nothing was given.", media.free),
    ]
    for name, caption, documents in rows:
        shown = "".join(
            f'<img alt="{name} {number}" src="data:image/png;base64,{_encoded(media, document)}">'
            for number, document in enumerate(documents, 1)
        )
        if shown:
            yield f'<figure class="pictures"><figcaption>{caption}</figcaption>{shown}</figure>'


def _sounds(media: Media) -> Iterator[str]:
    """Each original beside its completion, in which the part that the model added has another colour."""
    figures: list[str] = []
    for number, done in enumerate(media.completions, 1):
        completed = done.prompt + done.added
        loudest = max(_peak(media, document) for document in (done.original, completed))
        figures += [
            _sound(media, f"Original {number}, from the {media.split} documents.", done.original, None, loudest),
            _sound(
                media,
                f"Completed {number}: the model added what has the second colour.",
                completed,
                done.given,
                loudest,
            ),
        ]
    for number, document in enumerate(media.free, 1):
        loudest = _peak(media, document)
        figures.append(_sound(media, f"Free sample {number}: nothing was given.", document, 0, loudest))
    if figures:
        yield f'<div class="columns">{"".join(figures)}</div>'


_GALLERIES: dict[str, Callable[[Media], Iterator[str]]] = {".png": _pictures, ".wav": _sounds}


def _encoded(media: Media, document: bytes) -> str:
    return b64encode(media.modality.decode(document)).decode()


def _sound(media: Media, caption: str, document: bytes, given: int | None, loudest: float) -> str:
    """A caption, the wave, and a player; bytes from `given` on were added by the model."""
    levels, rate = _levels(media.modality.decode(document))
    own = 1.0 if given is None or not document else given / len(document)
    caption = f"{caption} {len(levels) / rate:.2f} seconds."
    shape = _wave(levels / loudest, own, caption)
    player = f'<audio controls src="data:audio/wav;base64,{_encoded(media, document)}"></audio>'
    return f"<figure>{shape}{player}<figcaption>{escape(caption)}</figcaption></figure>"


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
    """The loudest level: what a wave is drawn to the scale of, so that speech that is not loud can be seen."""
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
