"""Evaluation of a model on documents: bits per byte with confidence interval, by file, beside compressors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bytelm.data.modalities.base import Modality, unit_of
from bytelm.errors import DataError
from bytelm.evaluate.bits import DocumentBits, Precision, measure
from bytelm.evaluate.compressors import compressed, compressed_each
from bytelm.evaluate.meter import Meter, interval
from bytelm.interfaces.model import ByteModel
from bytelm.units import LN2, bits_per_byte


@dataclass(frozen=True)
class FileBits:
    """One file's or kind's share: bits, summed over its bytes."""

    name: str
    bytes: int
    bits: float
    bits_per_byte: float


@dataclass(frozen=True)
class EvalReport:
    """What a model makes of documents. Every byte is scored once; context and stride say what it was scored from.

    `low` and `high` bound the 95 % bootstrap interval over documents; None with fewer than two. `planes` are the bits
    per byte of each plane that bytes stand for in turn: red, green, blue. `unit` names the unit of all of these.
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
    planes: dict[str, float] = field(default_factory=dict[str, float])
    unit: str = "bits per byte"

    def mapping(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def judge(
    model: ByteModel,
    documents: Iterable[tuple[str, bytes | np.ndarray]],
    context: int,
    stride: int | None = None,
    progress: Callable[[int], None] | None = None,
    modality: Modality | None = None,
    precision: Precision = "float32",
    batch: int = 8,
) -> EvalReport:
    """Measure documents given as (name, bytes); those of one name are one file. Raises DataError if there are none.

    With a `modality` the formats made for it are among the compressors, and each plane is measured too.
    `precision`, `batch`: see `measure`.
    """
    documents = list(documents)
    planes, formats = (modality.planes, modality.compressors()) if modality is not None else ((), {})
    planes = () if model.tokens is not None else planes  # a token may span several
    period = max(1, len(planes))
    how: dict[str, Any] = {
        "context": context,
        "stride": stride,
        "batch": batch,
        "period": period,
        "precision": precision,
    }
    found = list(measure(model, documents, progress=progress, **how))
    whole = Meter.of(found)
    if not whole.bytes:
        raise DataError(f"{len(documents)} documents have 0 bytes together: there is nothing to evaluate")
    bounds, data = interval(found), [document for _, document in documents]
    return EvalReport(
        bytes=whole.bytes,
        bits=whole.nats / LN2,
        bits_per_byte=whole.bits_per_byte,
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        documents=len(found),
        context=context,
        stride=stride or max(1, context // 2),
        files=by_name(found),
        compressors=compressed(data) | compressed_each(data, formats),
        planes=by_plane(found, planes),
        unit=unit_of(modality),
    )


def by_plane(found: Iterable[DocumentBits], planes: tuple[str, ...]) -> dict[str, float]:
    """The bits per byte of each of several planes; those without a byte, and a single one, are left out."""
    found, period = list(found), len(planes)
    counts = [sum((document.bytes - p + period - 1) // period for document in found) for p in range(period)]
    return {
        plane: bits_per_byte(math.fsum(document.by_place[p] for document in found), counts[p])
        for p, plane in enumerate(planes)
        if period > 1 and counts[p]
    }


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
