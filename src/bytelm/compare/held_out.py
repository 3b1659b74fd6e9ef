"""What all models are evaluated on: segments of held-out documents, the same bytes for each, kept in one file."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from bytelm.data.files import write_whole
from bytelm.errors import DataError
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.robustness.base import character

LIMIT = 1 << 19  # bytes evaluated
LONGEST = 1 << 14  # bytes per segment
UNITS = 8  # from this many documents on, documents are resampled; below, segments

Stretch = tuple[int, bytes]
"""The number of a document, and consecutive bytes of it."""


def stretches(documents: Iterable[bytes], limit: int = LIMIT, longest: int = LONGEST, grain: int = 1) -> list[Stretch]:
    """Segments of up to `longest` bytes, evenly over all documents, about `limit` bytes in total.

    They start at multiples of `grain`, and are at least that long; where it is 1, at a character, up to 3 bytes later,
    so that tokenizers of text can read them. Raises DataError if there are no bytes.
    """
    found: list[Stretch] = []
    for number, document in enumerate(documents):
        parts = -(-len(document) // (max(longest // grain, 1) * grain))
        size = -(-len(document) // (max(parts, 1) * grain)) * grain  # equal parts, except the last
        starts = range(0, len(document), max(size, 1))
        cuts = {character(document, start) if grain == 1 else start for start in starts[1:]}
        edges = [*starts[:1], *sorted(cuts), len(document)]
        found += [(number, document[start:end]) for start, end in pairwise(edges)]
    sizes = [len(data) for _, data in found]
    if not sum(sizes):
        raise DataError("no held-out bytes to evaluate on: give more data, or files with --held-out")
    if sum(sizes) <= limit:
        return found
    # The segments that contain evenly spaced bytes: sampled in proportion to their length.
    count = max(1, round(limit * sum(sizes) / sum(size**2 for size in sizes)))
    ends, places = list(accumulate(sizes)), ((2 * k + 1) * sum(sizes) // (2 * count) for k in range(count))
    return [found[index] for index in sorted({bisect.bisect_right(ends, place) for place in places})]


def keep(path: Path, chosen: Sequence[Stretch]) -> None:
    """Write segments: one line of JSON (document numbers and lengths), then their bytes."""
    head = json.dumps([[number, len(data)] for number, data in chosen]).encode()
    write_whole(path, head + b"\n" + b"".join(data for _, data in chosen))


def kept(path: Path) -> list[Stretch]:
    """Read the segments that `keep` wrote."""
    head, _, data = path.read_bytes().partition(b"\n")
    found: list[Stretch] = []
    for number, size in json.loads(head):
        found.append((number, data[:size]))
        data = data[size:]
    return found


def units(found: Iterable[DocumentBits]) -> list[DocumentBits]:
    """The units of the bootstrap: documents, or single segments where there are few documents."""
    found = list(found)
    names = list(dict.fromkeys(stretch.name for stretch in found))
    if len(names) < UNITS:
        return found
    parts = {name: [stretch for stretch in found if stretch.name == name] for name in names}
    return [DocumentBits(name, sum(s.bytes for s in own), sum(s.nats for s in own)) for name, own in parts.items()]
