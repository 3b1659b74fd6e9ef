"""What all models are measured on: stretches of held-out documents, the same bytes for each, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bytelm.data.files import write_whole
from bytelm.errors import DataError
from bytelm.evaluate.bits import DocumentBits

LIMIT = 1 << 19  # bytes that are measured
LONGEST = 1 << 14  # bytes of a stretch
UNITS = 8  # documents from which on they are what is resampled, and stretches below

Stretch = tuple[int, bytes]
"""The number of a document, and some bytes of it in a row."""


def stretches(documents: Iterable[bytes], limit: int = LIMIT, longest: int = LONGEST, grain: int = 1) -> list[Stretch]:
    """Stretches of up to `longest` bytes, evenly over all documents, that come to about `limit` bytes.

    They begin at multiples of `grain`, at least one of which is a stretch. Raises DataError where there are no bytes.
    """
    longest = max(longest // grain, 1) * grain
    found = [
        (number, document[start : start + longest])
        for number, document in enumerate(documents)
        for start in range(0, len(document), longest)
    ]
    total = sum(len(data) for _, data in found)
    if not total:
        raise DataError("there are no held-out bytes to measure on: give more data, or files with --held-out")
    if total <= limit:
        return found
    # The stretch in which each of so many evenly spaced bytes lies.
    count, taken, chosen = max(1, round(limit / (total / len(found)))), 0, list[Stretch]()
    for index, stretch in enumerate(found):
        if (index + 1) * count // len(found) > taken:
            taken += 1
            chosen.append(stretch)
    return chosen


def keep(path: Path, chosen: Sequence[Stretch]) -> None:
    """Write stretches: a line of JSON that says which are whose, and their bytes."""
    head = json.dumps([[number, len(data)] for number, data in chosen]).encode()
    write_whole(path, head + b"\n" + b"".join(data for _, data in chosen))


def kept(path: Path) -> list[Stretch]:
    """The stretches that `keep` wrote."""
    head, _, data = path.read_bytes().partition(b"\n")
    found: list[Stretch] = []
    for number, size in json.loads(head):
        found.append((number, data[:size]))
        data = data[size:]
    return found


def units(found: Iterable[DocumentBits]) -> list[DocumentBits]:
    """Measured stretches as what is resampled: those of a document together, where there are documents enough."""
    found = list(found)
    names = list(dict.fromkeys(stretch.name for stretch in found))
    if len(names) < UNITS:
        return found
    parts = {name: [stretch for stretch in found if stretch.name == name] for name in names}
    return [DocumentBits(name, sum(s.bytes for s in own), sum(s.nats for s in own)) for name, own in parts.items()]
