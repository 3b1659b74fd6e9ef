"""Is a word more probable than a misspelling of it, where the word stands in a text?

Misspellings are one edit away and occur nowhere in the texts: two neighbours swapped, a letter dropped, doubled, or
replaced by its neighbour on a keyboard. Scored are the word and the bytes that follow, so that its end counts. Dropped
letters make the misspelling shorter and doubled ones longer; the other two have the length of the word.

Frequent words are those that make up half of the words of the texts, rare ones the others, of 3 occurrences at least.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from numpy.random import Generator

from bytelm.data.tasks import pick
from bytelm.data.words import Vocabulary, decoded, encoded, found_in
from bytelm.evaluate.published import texts
from bytelm.evaluate.robustness.base import Item, Query, Sources, character, generator

TITLE = "real words against misspellings in context"
NEEDS = "texts with words that occur at least 3 times"

LEAST = 3  # occurrences of a word
LETTERS = range(4, 17)
CONTEXT, AFTER = 256, 8  # bytes before a word, and characters after it
SCENE, SCENES = 1024, 4096  # bytes of an excerpt, and how many are searched for places
TRIES = 8  # misspellings of a word, until one occurs nowhere
Place = tuple[str, bytes, str, str]  # unit, prefix, white space before the word, what follows it

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {
    letter: row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    for row in ROWS
    for place, letter in enumerate(row)
}


def swap(word: str, draw: Generator) -> str:
    """Two neighbours swapped."""
    place = int(draw.integers(len(word) - 1))
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def drop(word: str, draw: Generator) -> str:
    """Without a letter."""
    place = int(draw.integers(len(word)))
    return word[:place] + word[place + 1 :]


def double(word: str, draw: Generator) -> str:
    """With a letter twice."""
    place = int(draw.integers(len(word)))
    return word[:place] + word[place] + word[place:]


def replace(word: str, draw: Generator) -> str:
    """With a letter replaced by its neighbour on a keyboard; the word itself where there are no such letters."""
    place = int(draw.integers(len(word)))
    return word[:place] + pick(NEIGHBOURS.get(word[place], word[place]), draw) + word[place + 1 :]


EDITS: Mapping[str, Callable[[str, Generator], str]] = {
    "swapped": swap,
    "dropped": drop,
    "doubled": double,
    "replaced": replace,
}


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Up to `amount` words in each row, an edit and frequent or rare words; of all edits the same if possible."""
    given = texts(sources)
    known = Vocabulary.of(data for _, data in given.documents)
    places = places_of(given, known, seed)
    for band, words in bands(known).items():
        here = [word for word in words if word in places]
        order = generator(seed, "spelling", band).permutation(len(here)).tolist()
        for name, edit in EDITS.items():
            draw, left = generator(seed, "spelling", band, name), amount
            for word in (here[place] for place in order):
                if left and (wrong := misspelt(word, edit, known, draw)):
                    left -= 1
                    yield item(f"{name}, {band} words", pick_place(places[word], draw), word, wrong)


def bands(known: Vocabulary) -> dict[str, list[str]]:
    """The words, by how frequent they are."""
    half, found = sum(known.counts.values()) / 2, dict[str, list[str]](frequent=[], rare=[])
    for word, count in known.counts.items():
        if count >= LEAST and len(word) in LETTERS:
            found["frequent" if half > 0 else "rare"].append(word)
        half -= count
    return found


def places_of(given: Sources, known: Vocabulary, seed: int) -> dict[str, list[Place]]:
    """Where words occur, in excerpts of the texts: with something before them and after them."""
    found: defaultdict[str, list[Place]] = defaultdict(list)
    for name, data in given.excerpts(SCENE, SCENES, seed):
        text = decoded(data)
        for start, word in found_in(text):
            before = text[:start].rstrip()
            after = text[start + len(word) : start + len(word) + AFTER]
            if len(word) in LETTERS and known.counts.get(word, 0) >= LEAST and before and after:
                prefix = encoded(before[-CONTEXT:])
                prefix = prefix[character(prefix, max(0, len(prefix) - CONTEXT)) :]
                found[word].append((name, prefix, text[len(before) : start], after))
    return found


def pick_place(places: Sequence[Place], draw: Generator) -> Place:
    """One of several, at random."""
    return places[int(draw.integers(len(places)))]


def misspelt(word: str, edit: Callable[[str, Generator], str], known: Vocabulary, draw: Generator) -> str | None:
    """A misspelling that occurs nowhere; None where none of a few does."""
    found = (edit(word, draw) for _ in range(TRIES))
    return next((wrong for wrong in found if wrong not in known.forms), None)


def item(row: str, place: Place, word: str, wrong: str) -> Item:
    """The word in its place against the misspelling there. A unit is a word."""
    _, prefix, before, after = place
    queries = (Query(prefix, encoded(before + form + after)) for form in (word, wrong))
    return Item(row, word, "choice", tuple(queries))
