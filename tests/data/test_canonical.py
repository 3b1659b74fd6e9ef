"""Which tokens follow in canonical encodings, against encoding itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from bytelm.data import bpe
from bytelm.data.bpe import LONGEST, NONE, Bpe
from bytelm.data.canonical import START, Canonical, Place, has, part
from bytelm.errors import DataError
from bytelm.units import EOS, VOCAB
from token_texts import LITTLE, TEXT, noise


def short_words(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    monkeypatch.setattr(bpe, "WORDS", bpe.WORDS.replace(f"{{1,{LONGEST}}}", f"{{1,{longest}}}"))


def made(*pairs: tuple[bytes, bytes]) -> Bpe:
    """The tokens of merges given as bytes."""
    ids = {bytes([i]): i for i in range(256)}
    merges: list[tuple[int, int]] = []
    for left, right in pairs:
        merges.append((ids[left], ids[right]))
        ids[left + right] = VOCAB + len(ids) - 256
    return Bpe(np.array(merges, np.int64).reshape(-1, 2))


def walk(words: Canonical, ids: Iterable[int]) -> Iterator[tuple[Place, int]]:
    """The place, and the last id, before each of some ids and after them. Fails where one is not allowed."""
    place, last = START, EOS
    yield place, last
    for id in ids:
        (token,) = np.flatnonzero(words.ids == id)
        assert has(words.allowed(place, last), int(token)), f"{id} after {last} at {place}"
        place, last = words.after(place, last, int(token)), id
        yield place, last


def allowed(words: Canonical, longest: int) -> set[tuple[int, ...]]:
    """Every sequence of tokens that is allowed, of up to so many bytes, all of them in ALPHABET."""
    found: set[tuple[int, ...]] = set()
    waiting: list[tuple[tuple[int, ...], int, Place, int]] = [((), 0, START, EOS)]
    while waiting:
        ids, size, place, last = waiting.pop()
        found.add(ids)
        for token in np.flatnonzero(part(words.allowed(place, last), 0, len(words.ids))).tolist():
            id, more = int(words.ids[token]), size + int(words.sizes[token])
            if more <= longest and set(words.tokens.data[id]) <= ALPHABET:
                waiting.append(((*ids, id), more, words.after(place, last, token), id))
    return found


ALPHABET = set(b"ab! \n")
MADE = {
    "runs": made((b"a", b"a"), (b"aa", b"a"), (b"aa", b"aa"), (b"\n", b"\n"), (b" ", b" "), (b" ", b"a")),
    "crossing": made((b"a", b"b"), (b"b", b"a"), (b"ab", b"ab"), (b"b", b"b"), (b"ba", b"b"), (b" ", b"ab")),
    "out of reach": made(
        (b"b", b"a"), (b"a", b"a"), (b"a", b"b"), (b"ab", b"a"), (b"aa", b"b"), (b"a", b"!"), (b" ", b"\n")
    ),
    "white": made(
        (b" ", b"\n"), (b"\n", b" "), (b"\n", b"\n"), (b" \n", b" "), (b" ", b"!"), (b"!", b"!"), (b"!", b" ")
    ),
    "none": Bpe.empty(300),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("longest", [2, 3])
def test_a_sequence_is_allowed_if_the_encoding_of_something_begins_with_it(
    name: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_words(monkeypatch, longest)
    tokens, size = Bpe(MADE[name].merges), 4
    canonical: set[tuple[int, ...]] = set()
    ended: set[tuple[int, ...]] = set()
    for count in range(size + 3):
        for data in itertools.product(sorted(ALPHABET), repeat=count):
            ids = tuple(tokens.encode(bytes(data)).tolist())
            ended.add(ids)
            canonical |= {ids[:end] for end in range(len(ids) + 1) if int(tokens.sizes[list(ids[:end])].sum()) <= size}
    words = Canonical(tokens, longest)
    assert allowed(words, size) == canonical
    for ids in canonical:
        *_, (place, _) = walk(words, ids)
        assert place.ends == (ids in ended)


def random_merges(seed: int, letters: bytes, count: int) -> Bpe:
    """Merges of ids drawn at random, whatever they would have been learned from."""
    rng = np.random.default_rng(seed)
    ids, merges, known = list(letters), list[tuple[int, int]](), {bytes([i]): i for i in letters}
    data = {i: bytes([i]) for i in letters}
    while len(merges) < count:
        left, right = rng.choice(ids, 2).tolist()
        joined = data[left] + data[right]
        if joined not in known and len(joined) <= 8:
            known[joined] = id = VOCAB + len(merges)
            data[id] = joined
            ids.append(id)
            merges.append((left, right))
    return Bpe(np.array(merges, np.int64))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("letters", [b"a", b"ab", b"abc", b"\t\n"])
def test_two_tokens_of_a_word_may_meet_if_they_are_how_their_bytes_are_encoded(seed: int, letters: bytes) -> None:
    tokens = random_merges(seed, letters, 4 if letters == b"a" else 14)
    words = Canonical(tokens)
    checked = 0
    for left in words.ids.tolist():
        flags = part(words.pairs(left), 0, len(words.ids))
        for right, meets in zip(words.ids.tolist(), flags.tolist(), strict=True):
            data = tokens.data[left] + tokens.data[right]
            if set(data) <= set(letters):
                assert (tokens.encode(data).tolist() == [left, right]) == meets, data
                checked += meets
    assert checked


SEEDED = Bpe.learn([TEXT, noise(3000), b"a " * 60, b"\n\n\n\n" * 40, b"  " * 90, b"0" * 99, b"!?" * 99], 700)


@pytest.mark.parametrize("tokens", [SEEDED, LITTLE, Bpe.empty(300)])
def test_every_encoding_is_allowed(tokens: Bpe) -> None:
    words = Canonical(tokens)
    runs = [
        unit * (LONGEST + extra) for unit in (b"a", b"0", b"!", b" ", b"\n") for extra in (-2, -1, 0, 1, 2, LONGEST)
    ]
    datas = [
        TEXT[:300],
        noise(500, 3),
        *runs,
        *(b"a" + run + b"b" for run in runs),
        *(b" " + run + b" " for run in runs),
    ]
    rng = np.random.default_rng(0)
    datas += [bytes(rng.choice(list(b"ab0! \n\t\xff"), 60).tolist()) for _ in range(50)]
    for data in datas:
        *_, (place, _) = walk(words, tokens.encode(data).tolist())
        assert place.ends


@pytest.mark.parametrize("kind", [b"a", b"7", b"-", b"\n", b" "])
def test_words_end_at_their_limit(kind: bytes) -> None:
    """What follows a run is what some encoding has there, before the limit, at it and after it."""
    tokens = made((kind, kind), (b"x", b"y"))
    words, pair = Canonical(tokens), VOCAB
    for count in range(LONGEST - 3, LONGEST + 4):
        ids = tokens.encode(kind * count).tolist()
        *_, (place, last) = walk(words, ids)
        for id in (pair, kind[0]):
            (token,) = np.flatnonzero(words.ids == id)
            wanted = any(
                tokens.encode(kind * count + tokens.data[id] + more)[: len(ids) + 1].tolist() == [*ids, id]
                for more in (b"", kind, b"x")
            )
            assert has(words.allowed(place, last), int(token)) == wanted, (count, id)


def test_a_space_that_always_joins_what_follows_is_never_by_itself_before_it() -> None:
    others = [bytes([i]) for i in range(256) if i not in b"\t\n\x0b\x0c\r "]
    words = Canonical(made(*((b" ", other) for other in others), (b"\n", b"\n")))
    space, newline = (int(np.flatnonzero(words.ids == id)[0]) for id in (32, 10))
    *_, (place, last) = walk(words, [10])
    assert has(words.allowed(place, last), space) and has(words.allowed(place, last), newline)
    *_, (place, last) = walk(words, [10, 32])
    assert place == Place(START.kind, 2) and not has(
        words.allowed(place, last), int(np.flatnonzero(words.ids == 97)[0])
    )
    tied = Canonical(made(*((b" ", other) for other in others), (b"\n", b" ")))
    *_, (place, last) = walk(tied, [10])
    assert not has(tied.allowed(place, last), int(np.flatnonzero(tied.ids == 32)[0]))


def test_two_ids_of_the_same_bytes_are_refused() -> None:
    merges = np.array([(97, 98), (98, 99), (260, 99), (97, 261), (NONE, NONE)])
    with pytest.raises(DataError, match="tokens 262 and 263 stand for the same bytes"):
        Canonical(Bpe(merges))
