"""Which predictors suit some bytes: those for text, for images of some row length, for 16-bit audio, or for records.

    settings = suited(data)     of a memory for bytes like these
    kind_of(settings)           which of these it has, in words
    memory_for(count)           bytes of a memory that learns so many

What suits is tried: bytes from three places are read with each set that is not far off in the middle, and the cheapest
is taken.
Text, by far the most frequent, is told by its differences, which need more bits than its bytes do, and by its having no
distance at which bytes are often equal; so nothing is tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bytelm import machine
from bytelm.online.memory import Memory
from bytelm.online.settings import TEXT, Settings

SAMPLE = 1 << 20  # bytes that need be given, at most
LOOKED_AT, TRIAL, SMALL = 1 << 16, 1 << 14, 4 << 20  # bytes: of statistics, of each place of a trial, of its memory
FRAME = 12  # bytes: whole pixels and samples of all kinds
CHANNELS = (1, 2, 3, 4)
NEAREST_ROW = 24  # bytes
LONGEST_RECORD = 1 << 11  # bytes
REPEATED = 0.15  # of the bytes that usually differ from one some way before, those that equal the one a record before
ROOM, MOST = 64, 1 << 30  # bytes of memory: for each that is learnt, and at most
WINS = 0.99  # of the bits of the best so far, at most: simpler sets come first


def memory_for(count: int) -> int:
    """Bytes of a memory that learns so many: `ROOM` for each, a power of two; an eighth of this machine's at most.

    Not less than the default. What is learnt takes the place of what was, where there is no room for both.
    """
    total = machine.memory().total
    most = min(MOST, 1 << (total // 8).bit_length() - 1) if total else MOST
    return max(Settings.memory, min(1 << round(math.log2(max(1, ROOM * count))), most))


def for_file(first: NDArray[np.uint8] | bytes, size: int) -> Settings:
    """Of a memory that begins empty and learns `size` bytes, of which these are the first."""
    return suited(first, Settings(memory=memory_for(size)))


def image(channels: int, row: int) -> tuple[str, ...]:
    """Predictors for pixels of so many bytes, in rows of so many: neighbours, and planes and lines through them."""
    beside, above = f"plane:{channels}:{channels}", f"plane:{channels}:{row}"
    planes = [f"{beside}:{row}:0", f"{beside}:{row - channels}:0", f"{beside}:{channels}:0", f"{above}:{row}:0"]
    if channels > 1:  # by what the colour before is beside what it was expected to be
        planes += [f"{beside}:1:0", f"{above}:1:0", f"{beside}:{row}:1"]
    return ("order:0", "order:1", "order:2", f"stride:{channels}", f"stride:{row}", "match:24", *planes)


def audio(channels: int) -> tuple[str, ...]:
    """Predictors for so many channels of 16-bit samples: a filter that learns fast, and one that learns slowly."""
    filters = [f"wave:{channels}:{step}:{detail}" for step in (128, 32) for detail in (0, 1)]
    return ("order:0", "order:1", f"stride:{2 * channels}", "match:24", *filters)


def records(size: int) -> tuple[str, ...]:
    """Predictors for records of so many bytes: fields by their place, with neighbours, and by what is above alone."""
    fields = (f"field:{size}:{looked_at}" for looked_at in (0, 1, 4, 5, 3, 7, 8))
    above = (f"plane:1:{size}:0:0", f"plane:1:{size}:{size}:0")
    return (*(f"order:{n}" for n in range(5)), f"stride:{size}", *fields, *above, "match:6", "match:16")


def suited(data: NDArray[np.uint8] | bytes, settings: Settings | None = None) -> Settings:
    """`settings` (the default ones) with predictors that suit bytes like these: the beginning of a file, say."""
    whole = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    seen = whole[max(0, len(whole) - LOOKED_AT) // 2 // FRAME * FRAME :][:LOOKED_AT]
    settings = settings or Settings()
    best, least = TEXT, 0.0
    for predictors in candidates(seen):
        least = least or cost(whole, TEXT)
        if (bits := cost(whole, predictors)) < WINS * least:
            best, least = predictors, bits
    return replace(settings, predictors=best)


def kind_of(settings: Settings) -> str:
    """What the predictors are for, in words that follow "for"."""
    if settings.predictors == TEXT:
        return "text"
    strides = [int(name.removeprefix("stride:")) for name in settings.predictors if name.startswith("stride:")]
    if len(strides) == 2 and settings.predictors == image(*strides):
        return f"images of {strides[0]} bytes a pixel and {strides[1]} a row"
    for channels in CHANNELS[:2]:
        if settings.predictors == audio(channels):
            return f"16-bit audio of {channels} channel{'s' if channels > 1 else ''}"
    if len(strides) == 1 and settings.predictors == records(*strides):
        return f"records of {strides[0]} bytes"
    return ", ".join(settings.predictors)


def cost(data: NDArray[np.uint8], predictors: tuple[str, ...]) -> float:
    """What bytes of the beginning, the middle and the end cost memories that begin empty, in nats."""
    starts = {max(0, place * len(data) // 6 - TRIAL // 2) // FRAME * FRAME for place in (1, 3, 5)}
    parts = [data[start:][:TRIAL] for start in starts] if len(data) > 3 * TRIAL else [data]
    return sum(float(Memory(Settings(predictors, SMALL)).nats(part).sum()) for part in parts)


def candidates(data: NDArray[np.uint8]) -> Iterator[tuple[str, ...]]:
    """The sets whose differences need fewer bits than the bytes themselves."""
    if len(data) < 1024:
        return
    plain = entropy(data)
    for channels in CHANNELS:
        if entropy(data[channels:] - data[:-channels]) < plain and (row := likeliest_row(data, channels)):
            yield image(channels, row)
    samples = data[: len(data) // 2 * 2].view("<i2")
    high = entropy(samples.view(np.uint8)[1::2])
    for count in CHANNELS[:2]:
        if entropy((samples[count:] - samples[:-count]).view(np.uint8)[1::2]) < high:
            yield audio(count)
    if size := likeliest_record(data):
        yield records(size)


def entropy(data: NDArray[np.uint8]) -> float:
    """Of the distribution of bytes, in bits."""
    share = np.bincount(data, minlength=256) / max(1, len(data))
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def likeliest_record(data: NDArray[np.uint8]) -> int | None:
    """The least distance in bytes at which bytes are equal nearly as often as at any; None if that is hardly more."""
    lags = range(2, min(LONGEST_RECORD, len(data) // 8))
    equal = np.array([np.count_nonzero(data[lag:] == data[:-lag]) / (len(data) - lag) for lag in lags])
    usual, most = float(np.median(equal)), float(equal.max())
    if most - usual < REPEATED * (1 - usual) or usual == 1:
        return None
    return lags[int((equal >= most - (most - usual) / 4).argmax())]


def likeliest_row(data: NDArray[np.uint8], channels: int) -> int | None:
    """The distance in bytes at which bytes differ least, and less than a pixel nearer and a pixel further."""
    x = data.astype(np.float64) - data.mean()
    spectrum = np.fft.rfft(x, 2 * len(x))
    squares = np.concatenate([[0.0], np.cumsum(x * x)])
    lags = np.arange(len(x) // 4)
    products = np.fft.irfft(np.abs(spectrum) ** 2)[: len(lags)]
    apart = (squares[len(x) - lags] + squares[-1] - squares[lags] - 2 * products) / (len(x) - lags)
    inside = np.arange(max(NEAREST_ROW, channels + 1), len(lags) - channels)
    dips = inside[(apart[inside] < apart[inside - channels]) & (apart[inside] < apart[inside + channels])]
    return int(dips[apart[dips].argmin()]) if len(dips) else None
