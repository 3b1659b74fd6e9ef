"""Evaluation of a model on documents: bits per byte with confidence interval, by file, beside compressors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from bytelm.data.modalities.base import Modality, unit_of
from bytelm.errors import DataError
from bytelm.evaluate.bits import DocumentBits, Precision, measure
from bytelm.evaluate.compressors import compressed, compressed_each
from bytelm.evaluate.dynamic import Dynamic, Learning
from bytelm.evaluate.meter import Meter, interval
from bytelm.interfaces.model import ByteModel
from bytelm.online.kinds import kind_of
from bytelm.online.memory import Memory
from bytelm.units import LN2, bits_per_byte


@dataclass(frozen=True)
class FileBits:
    """One file's or kind's share: bits, summed over its bytes."""

    name: str
    bytes: int
    bits: float
    bits_per_byte: float


@dataclass(frozen=True)
class OnlineBits:
    """The bits of the same bytes by the model and a memory that learns them (`bytelm.online`), in the given order.

    `read_before`: bytes that the memory had read when it began; `memory`: its size in bytes; `kind`: of the bytes that
    its predictors are for (`online.kinds`). The interval is over documents as for the model alone.
    """

    bits: float
    bits_per_byte: float
    low: float | None
    high: float | None
    files: list[FileBits]
    read_before: int
    memory: int
    kind: str


@dataclass(frozen=True)
class DynamicBits:
    """The bits of the same bytes by a copy of the model whose weights learn them (`evaluate.dynamic`), in their order.

    `learning`: which weights, by steps of `rate`, one for each window. `copied_bytes` and `state_bytes`: memory of the
    weights that learn, which are held twice, and of the optimizer. `online`: with a memory beside it, like the model's.
    """

    bits: float
    bits_per_byte: float
    low: float | None
    high: float | None
    files: list[FileBits]
    learning: Learning
    rate: float
    copied_bytes: int
    state_bytes: int
    bytes_per_second: float
    online: OnlineBits | None = None


@dataclass(frozen=True)
class EvalReport:
    """What a model makes of documents. Every byte is scored once; context and stride say what it was scored from.

    `low` and `high` bound the 95 % bootstrap interval over documents; None with fewer than two. `planes` are the bits
    per byte of each plane that bytes stand for in turn: red, green, blue. `unit` names the unit of all of these.
    `online`: what a memory makes of it that learns while the model, of which all else is, reads; `dynamic`: what the
    model makes of it while its own weights learn.
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
    online: OnlineBits | None = None
    dynamic: DynamicBits | None = None

    def mapping(self) -> dict[str, Any]:
        """As plain JSON; without `online` and `dynamic` where nothing learned."""
        found = asdict(self)
        learned = (found, found["dynamic"] or {})
        for part, name in ((part, name) for part in learned for name in ("online", "dynamic")):
            if name in part and part[name] is None:
                del part[name]
        return found


def judge(
    model: ByteModel,
    documents: Iterable[tuple[str, bytes | np.ndarray]],
    context: int,
    stride: int | None = None,
    progress: Callable[[int], None] | None = None,
    modality: Modality | None = None,
    precision: Precision = "float32",
    batch: int = 8,
    memory: Memory | None = None,
    dynamic: Dynamic | None = None,
) -> EvalReport:
    """Measure documents given as (name, bytes); those of one name are one file. Raises DataError if there are none.

    With a `modality` the formats made for it are among the compressors, and each plane is measured too.
    `precision`, `batch`, `memory`: see `measure`. With `dynamic` all is measured a second time, by weights that learn,
    and `progress` counts twice.
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
        "memory": memory,
    }
    read_before = 0 if memory is None else memory.read_bytes
    beside = memory.clone() if memory is not None and dynamic is not None else None
    found = list(measure(model, documents, progress=progress, **how))
    whole = Meter.of(found)
    if not whole.bytes:
        raise DataError(f"{len(documents)} documents have 0 bytes together: there is nothing to evaluate")
    own = None if dynamic is None else learned(model, documents, dynamic, progress, **how | {"memory": beside})
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
        online=None if memory is None else online(found, read_before, memory),
        dynamic=own,
    )


def online(found: Iterable[DocumentBits], read_before: int, memory: Memory) -> OnlineBits:
    """The same documents with the nats that a memory's learning makes of theirs."""
    found = [replace(document, nats=document.online or 0.0) for document in found]
    whole, bounds = Meter.of(found), interval(found)
    low, high = bounds or (None, None)
    kind = kind_of(memory.settings)
    return OnlineBits(whole.nats / LN2, whole.bits_per_byte, low, high, by_name(found), read_before, memory.bytes, kind)


def learned(
    model: ByteModel,
    documents: Iterable[tuple[str, bytes | np.ndarray]],
    dynamic: Dynamic,
    progress: Callable[[int], None] | None,
    **how: Any,
) -> DynamicBits:
    """What a copy of the model makes of documents while it learns them, and at which cost. `how`: as for `measure`."""
    memory: Memory | None = how["memory"]
    read_before, began = 0 if memory is None else memory.read_bytes, time.perf_counter()
    found = list(measure(model, documents, progress=progress, dynamic=dynamic, **how))
    seconds = time.perf_counter() - began
    whole, bounds = Meter.of(found), interval(found)
    return DynamicBits(
        bits=whole.nats / LN2,
        bits_per_byte=whole.bits_per_byte,
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        files=by_name(found),
        learning=dynamic.learning,
        rate=dynamic.rate,
        copied_bytes=dynamic.copied_bytes,
        state_bytes=dynamic.state_bytes,
        bytes_per_second=whole.bytes / max(1e-9, seconds),
        online=None if memory is None else online(found, read_before, memory),
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
