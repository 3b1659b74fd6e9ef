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
    sought = Sought(held_out)
    for document, begins in training:
        sought.look(document, begins)
    return sought.covered(), sought.looked


class Sought:
    """The windows of held-out documents, and which of them were found in training documents so far.

    Those that several processes found, each in some of the training documents, are together those that one finds.
    """

    def __init__(self, held_out: Sequence[Bytes]) -> None:
        self.looked = sum(len(document) for document in held_out)
        """Bytes of the documents."""
        self._sizes = [len(document) for document in held_out]
        self._windows = [_varied(document, _starts(document, np.zeros(1, np.int64))) for document in held_out]
        self._numbers = [_whole(document, starts) for document, starts in zip(held_out, self._windows, strict=True)]
        quick = np.concatenate([np.zeros(0, np.uint64), *map(_quick, held_out, self._windows)])
        numbers = np.concatenate([np.zeros(0, np.uint64), *self._numbers])
        self._whole, first = np.unique(numbers, return_index=True)
        self._quick_of = quick[first]
        self.found = np.zeros(len(self._whole), bool)
        """Which of the different windows were found."""
        self._seek()

    def _seek(self) -> None:
        """What was found once need not be found again."""
        self._quick = np.unique(self._quick_of[~self.found])
        self._left = len(self.found) - int(self.found.sum())
        self._table = _table(self._quick)

    def look(self, document: Bytes, begins: Places) -> None:
        """Look at training documents that are one after another, each beginning at one of `begins`."""
        starts = _starts(document, begins)
        keys = _quick(document, starts)
        maybe = np.flatnonzero(self._table[_place(keys)])
        maybe = maybe[_within(self._quick, keys[maybe])[1]]
        if len(maybe):
            where, there = _within(self._whole, _whole(document, starts[maybe]))
            self.found[where[there]] = True
        if (len(self.found) - int(self.found.sum())) * 16 < self._left * 15:
            self._seek()

    def covered(self) -> int:
        """Bytes of the held-out documents in windows that were found."""
        seen = self._whole[self.found]
        parts = zip(self._sizes, self._windows, self._numbers, strict=True)
        return sum(_covered(starts[_within(seen, own)[1]], size) for size, starts, own in parts)


def stretches(corpus: Corpus, split: Split, start: int = 0, stop: int | None = None) -> Iterator[tuple[Bytes, Places]]:
    """The documents of a split that begin from `start` on and before `stop`, several together.

    Each time with where in them each begins.
    """
    held: list[Bytes] = []
    size = 0
    for _, document in iterate_documents(corpus, split, start=start, stop=stop):
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
