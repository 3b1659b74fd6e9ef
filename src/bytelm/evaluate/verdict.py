"""The whole measurement of a model on documents: bits per byte with its interval, by file, beside compressors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bytelm.errors import DataError
from bytelm.evaluate.bits import DocumentBits, measure
from bytelm.evaluate.compressors import compressed
from bytelm.evaluate.meter import Meter, interval
from bytelm.models.base import ByteModel
from bytelm.units import LN2


@dataclass(frozen=True)
class FileBits:
    """One file's or kind's share: bits, summed over its bytes."""

    name: str
    bytes: int
    bits: float
    bits_per_byte: float


@dataclass(frozen=True)
class Verdict:
    """What a model makes of documents. Every byte is scored once; context and stride say what it was scored from.

    `low` and `high` bound the 95 % bootstrap interval over documents; None with fewer than two.
    """

    bytes: int
    bits: float
    bits_per_byte: float
    low: float | None
    high: float | None
    documents: int
    context: int
    stride: int
    files: list[FileBits]
    compressors: dict[str, float]

    def mapping(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def judge(
    model: ByteModel,
    documents: Iterable[tuple[str, bytes | np.ndarray]],
    context: int,
    stride: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Measure documents given as (name, bytes); those of one name are one file. Raises DataError if there are none."""
    documents = list(documents)
    found = list(measure(model, documents, context=context, stride=stride, progress=progress))
    whole = Meter.of(found)
    if not whole.bytes:
        raise DataError(f"{len(documents)} documents have 0 bytes together: there is nothing to measure")
    bounds = interval(found)
    return Verdict(
        bytes=whole.bytes,
        bits=whole.nats / LN2,
        bits_per_byte=whole.bits_per_byte,
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        documents=len(found),
        context=context,
        stride=stride or max(1, context // 2),
        files=by_name(found),
        compressors=compressed([document for _, document in documents]),
    )


def by_name(found: Iterable[DocumentBits]) -> list[FileBits]:
    """The sums of each name, in the order in which the names came."""
    names: dict[str, list[DocumentBits]] = {}
    for document in found:
        names.setdefault(document.name, []).append(document)
    meters = {name: Meter.of(documents) for name, documents in names.items()}
    return [
        FileBits(name, meter.bytes, meter.nats / LN2, meter.bits_per_byte)
        for name, meter in meters.items()
        if meter.bytes
    ]
