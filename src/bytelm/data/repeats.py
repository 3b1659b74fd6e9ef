"""Contamination: how much of the held-out documents also occurs verbatim in the training documents.

Both are compared in windows of 512 bytes that start a line or are at a multiple of 512 in their document, so that
repeats are found anywhere in a file. Of the held-out bytes a bounded sample is checked, of the training
bytes all, in one pass: four words of each window against a table first, then all of the few that agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import Corpus, Split, iterate_documents

WINDOW = 512
SAMPLE = 1 << 24  # most held-out bytes that are checked
_STRETCH = 1 << 20  # bytes of training documents that are checked together
_WORDS = WINDOW // 8
_QUICK = np.array([0, 23, 38, 56]) * 8  # positions of the four words in a window
_KEYS = np.random.default_rng(0).integers(1 << 63, size=_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_BITS = 22  # of a number that the table has a place for

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]
Numbers = NDArray[np.uint64]


def repeated(held_out: Sequence[Bytes], training: Iterable[tuple[Bytes, Places]]) -> tuple[int, int]:
    """(bytes of `held_out` in windows that also occur in `training`, bytes of `held_out`).

    `training` comes in segments: documents one after another, and where each begins. Windows of one byte over and over
    are not counted: blank parts are no contamination.
    """
    looked = sum(len(document) for document in held_out)
    windows = [_varied(document, _starts(document, np.zeros(1, np.int64))) for document in held_out]
    numbers = [_whole(document, starts) for document, starts in zip(held_out, windows, strict=True)]
    quick = np.concatenate([np.zeros(0, np.uint64), *map(_quick, held_out, windows)])
    whole, first = np.unique(np.concatenate([np.zeros(0, np.uint64), *numbers]), return_index=True)
    quick_of = quick[first]
    quick = np.unique(quick_of)
    found, sought = np.zeros(len(whole), bool), len(whole)
    table = _table(quick)
    for document, begins in training:
        starts = _starts(document, begins)
        keys = _quick(document, starts)
        maybe = np.flatnonzero(table[_place(keys)])
        maybe = maybe[_within(quick, keys[maybe])[1]]
        if len(maybe):
            where, there = _within(whole, _whole(document, starts[maybe]))
            found[where[there]] = True
        left = len(whole) - int(found.sum())
        if left * 16 < sought * 15:  # what was found once need not be found again
            quick, sought = np.unique(quick_of[~found]), left
            table = _table(quick)
    seen = whole[found]
    parts = zip(held_out, windows, numbers, strict=True)
    return sum(_covered(starts[_within(seen, own)[1]], len(document)) for document, starts, own in parts), looked


def stretches(corpus: Corpus, split: Split) -> Iterator[tuple[Bytes, Places]]:
    """The documents of a split, several together, and where in the segment each begins."""
    held: list[Bytes] = []
    size = 0
    for _, document in iterate_documents(corpus, split):
        held.append(document)
        size += len(document)
        if size >= _STRETCH:
            yield _joined(held)
            held, size = [], 0
    if held:
        yield _joined(held)


def _joined(documents: list[Bytes]) -> tuple[Bytes, Places]:
    sizes = np.array([len(document) for document in documents], np.int64)
    return np.concatenate(documents), np.cumsum(sizes) - sizes


def _starts(data: Bytes, begins: Places) -> Places:
    """Starts of the windows in concatenated documents, which start at `begins`."""
    last = len(data) - WINDOW
    if last < 0:
        return np.zeros(0, np.int64)
    opens = np.zeros(last + 1, bool)
    opens[1:] = data[:last] == ord("\n")
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(data)], strict=True):
        opens[begin:end:WINDOW] = True
        opens[max(begin, end - WINDOW + 1) : end] = False  # no window reaches into the next document
    return np.flatnonzero(opens)


def _varied(document: Bytes, starts: Places) -> Places:
    """Those of the windows that hold two different bytes."""
    changes = np.concatenate([[0], np.cumsum(document[1:] != document[:-1])])  # up to each byte
    return starts[changes[starts + WINDOW - 1] > changes[starts]]


def _quick(document: Bytes, starts: Places) -> Numbers:
    """A number for each window, of four of its words."""
    return _number(document, starts, _QUICK)


def _whole(document: Bytes, starts: Places) -> Numbers:
    """A number for each window, of all its words: two different windows share one once in 2^63 or so."""
    places = np.arange(_WORDS) * 8
    parts = [_number(document, starts[i : i + 4096], places) for i in range(0, len(starts), 4096)]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _number(document: Bytes, starts: Places, places: Places) -> Numbers:
    """A hash for each window, of the words at `places` in it."""
    mixed = np.zeros(len(starts), np.uint64)
    if len(starts):
        words = np.ndarray(len(document) - 7, np.uint64, document, strides=(1,))  # the eight bytes at any place
        for place, key in zip(places.tolist(), _KEYS, strict=False):
            # The shifts bring high bits down: sums of products alone would forget how they differ.
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + words[starts + place] * key
    return mixed ^ (mixed >> np.uint64(32))


def _place(numbers: Numbers) -> Numbers:
    return numbers & np.uint64((1 << _BITS) - 1)


def _table(numbers: Numbers) -> NDArray[np.bool_]:
    """Which places have a number: none of `numbers` is missed, and few others are taken for one."""
    table = np.zeros(1 << _BITS, bool)
    table[_place(numbers)] = True
    return table


def _within(known: Numbers, numbers: Numbers) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The index of each number in the sorted `known`, and whether it is there."""
    if not len(known):
        return np.zeros(len(numbers), np.intp), np.zeros(len(numbers), bool)
    where = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
    return where, known[where] == numbers


def _covered(starts: Places, size: int) -> int:
    """The bytes that windows at `starts` of a document of `size` bytes cover."""
    return int(np.minimum(np.diff(starts, append=size), WINDOW).sum())
