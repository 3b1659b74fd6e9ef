"""Mixtures: exact shares, each window once an epoch, limits of epochs, and samples of (seed, step) alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.data import corpora
from bytelm.data.corpora import Corpora, open_corpus, paths_by_source
from bytelm.data.corpus import SPLITS, Corpus, iterate_documents
from bytelm.data.mixture import BLOCK, Mixture, Share, dealt, shares_of
from bytelm.data.pack import pack
from bytelm.data.sampler import Sampler
from bytelm.data.selection import sample_evenly
from bytelm.errors import ConfigError, DataError, UsageError

SMALL = 64  # samples of a block, where a test goes through several


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Three sources of documents that differ in every byte: a of 'a's and so on, the second one the smallest."""
    home = tmp_path_factory.mktemp("parts")
    for number, (name, count) in enumerate((("a", 40), ("b", 6), ("c", 60))):
        (home / "files" / name).mkdir(parents=True)
        for i in range(count):
            (home / "files" / name / f"{i}.{name}").write_bytes(bytes([97 + number]) * (20 + 7 * i % 31))
        pack([home / "files" / name], home / "data" / name, valid=0.2, test=0.0)
    return [Corpus.open(home / "data" / name) for name in "abc"]


class Counted(Sampler):
    """A thousand windows and some, of nothing."""

    def __init__(self) -> None:
        self.windows, self.ids = 1024, 0


def mixed(
    parts: list[Corpus], shares: list[Share], batch: int = 1, rank: int = 0, world: int = 1, size: int = BLOCK
) -> Mixture:
    samplers = [Sampler(part, "train", 16, batch, 5) for part in parts]
    return Mixture(shares, samplers, batch, 5, rank, world, size)


def test_a_block_has_exact_shares_and_each_window_comes_once(parts: list[Corpus]) -> None:
    shares = [Share("a", 0.5), Share("b", 0.3), Share("c", 1 / 3)]
    size = 4096
    drawn = list(map(mixed(parts, shares, size=size).drawn, range(2 * size)))
    total = sum(Fraction(share.weight) for share in shares)
    for block in (drawn[:size], drawn[size:]):
        counts = Counter(source for source, _ in block)
        for source, share in enumerate(shares):
            assert abs(counts[source] - Fraction(share.weight) * size / total) < 1
    for source in range(3):
        numbers = sorted(number for which, number in drawn if which == source)
        assert numbers == list(range(len(numbers)))
    # Not in turn, and in an order of its own in each block.
    assert abs(Counter(source for source, _ in drawn[:1000])[0] - 441) < 80
    assert [s for s, _ in drawn[:size]] != [s for s, _ in drawn[size:]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.none() | st.integers(1, 300)), min_size=1, max_size=5),
    st.integers(0, 9),
)
def test_limits_are_kept_exactly_and_the_others_take_over(sources: list[tuple[int, int | None]], seed: int) -> None:
    weights, limits = [Fraction(weight) for weight, _ in sources], [limit for _, limit in sources]
    shares = [Share(str(i), weight, None if most is None else most / 1024) for i, (weight, most) in enumerate(sources)]
    found = Mixture(shares, [Counted() for _ in shares], 1, seed, size=SMALL)
    ends = None not in limits
    assert found.samples == (sum(limit or 0 for limit in limits) if ends else None)
    count = found.samples or 8 * SMALL
    drawn = list(map(found.drawn, range(count)))
    if ends:
        with pytest.raises(DataError, match="used up after"):
            found.drawn(count)
    left = list(limits)
    for first in range(0, count, SMALL):
        block = drawn[first : first + SMALL]
        counts = [sum(source == i for source, _ in block) for i in range(len(sources))]
        assert counts == dealt(weights, left, SMALL)
        left = [None if have is None else have - n for have, n in zip(left, counts, strict=True)]
        # Those that have more to give are in proportion to each other.
        going = [(w, n) for w, n, have in zip(weights, counts, left, strict=True) if have is None or have > 0]
        for (w, n), (v, m) in pairwise(going):
            assert abs(n / w - m / v) <= 1 / w + 1 / v
    for i, limit in enumerate(limits):
        numbers = sorted(number for source, number in drawn if source == i)
        assert numbers == list(range(len(numbers)))
        if limit is not None:
            assert len(numbers) <= limit and (not ends or len(numbers) == limit)


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 10**7), shape=st.sampled_from([(2, 4), (4, 2), (8, 1)]), seed=st.integers(0, 3))
def test_a_step_is_the_same_for_any_number_of_processes(
    parts: list[Corpus], step: int, shape: tuple[int, int], seed: int
) -> None:
    shares = [Share("a", 1), Share("b", 2, 3.5), Share("c", 1 + seed)]
    world, batch = shape
    alone = mixed(parts, shares, 8).batch(step)
    together = [mixed(parts, shares, batch, rank, world).batch(step).ids for rank in range(world)]
    np.testing.assert_array_equal(alone.ids, np.concatenate(together))


def test_the_windows_are_those_of_the_sources_in_their_epochs(parts: list[Corpus]) -> None:
    alone = mixed(parts, [Share("a", 0.5), Share("b", 0.2, 2), Share("c", 0.3)], 4, size=4096)
    for step in (0, 7, 12345):
        for row, ids in enumerate(alone.batch(step).ids):
            source, number = alone.drawn(4 * step + row)
            own = Sampler(parts[source], "train", 16, 1, 5).batch(number).ids[0]
            np.testing.assert_array_equal(ids, own)
    windows = alone.samplers[1].windows
    given_ = [n for source, n in map(alone.drawn, range(4096)) if source == 1]
    assert sorted(given_) == list(range(2 * windows))  # of two epochs, and no more
    assert alone.samples is None and alone.steps is None
    ends = mixed(parts, [Share("a", 0.5, 1), Share("b", 0.2, 2), Share("c", 0.3, 0.5)], 4)
    assert ends.samples == alone.samplers[0].windows + 2 * windows + alone.samplers[2].windows // 2
    assert ends.steps == ends.samples // 4
    with pytest.raises(DataError, match="allow more epochs"):
        ends.batch(ends.steps + 1)
    assert alone.epoch_of(0) == 0 < alone.epoch_of(2000)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["a=1", "b=1e-6"], "b = 1e-06 is 1e-06 of the mixture, and the least is 1 in 65,536"),
        (["a=0.5", "a=0.5"], "a is there 2 times"),
        (["a"], "no NAME=WEIGHT"),
        (["../a=1"], "no NAME=WEIGHT"),
        (["a=0"], "'0' must be a number above 0"),
        (["a=nan"], "'nan' must be"),
        (["a=1@"], "'' must be"),
        (["a=1@-2"], "'-2' must be"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(texts: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        shares_of(texts)


def test_paths_belong_to_sources() -> None:
    shares = shares_of(["a=1", "b=2@0.5"])
    assert shares[1] == Share("b", 2.0, 0.5)
    assert paths_by_source(["a=x", "b=y=z", "a=w"], shares) == {"a": ["x", "w"], "b": ["y=z"]}
    with pytest.raises(UsageError, match="notes is of no source of the mixture"):
        paths_by_source(["a=x", "notes"], shares)
    with pytest.raises(UsageError, match="b is in the mixture without data: add b=PATH"):
        paths_by_source(["a=x"], shares)


def test_what_is_one_corpus_is_not_written_again(parts: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """By all processes of a training at the same moment, of which some found the file of another renamed away."""
    home, shares = parts[0].directory.parent, shares_of(["a=0.5", "b=0.1", "c=0.4"])
    Corpora.write(home, shares, parts)
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "write_whole", lambda *_: pytest.fail("written again"))
        Corpora.write(home, shares, parts)
    others = shares_of(["a=0.4", "b=0.2", "c=0.4"])
    Corpora.write(home, others, parts)
    assert open_corpus(home).shares == others  # pyright: ignore[reportAttributeAccessIssue]


def test_all_sources_are_read_as_one_corpus(parts: list[Corpus]) -> None:
    home = parts[0].directory.parent
    shares = shares_of(["a=0.5", "b=0.1", "c=0.4"])
    Corpora.write(home, shares, parts)
    whole = open_corpus(home)
    assert isinstance(whole, Corpora) and whole.shares == shares
    whole.verify()
    for split in (None, *SPLITS):
        expected = [data.tobytes() for part in parts for _, data in iterate_documents(part, split)]
        assert [data.tobytes() for _, data in iterate_documents(whole, split)] == expected
        assert whole.count(split) == len(whole.documents(split)) == len(expected)
    for split in SPLITS:
        assert whole.bytes(split) == sum(part.bytes(split) for part in parts)
    start = parts[0].total - 3
    crossing = np.concatenate([parts[0].read(start, 3), parts[1].read(0, 5)])
    np.testing.assert_array_equal(whole.read(start, 8), crossing)
    table = whole.documents()
    for start, size, suffix in zip(table.starts, table.sizes, table.suffixes, strict=True):
        kind = chr(whole.read(int(start), int(size))[0])
        assert table.suffix_names[suffix] == f".{kind}"
    # A sample has the weights, not the sizes, of the sources.
    bytes = Counter[str]()
    for kind, data in sample_evenly(whole, "train", 600):
        bytes[kind] += len(data)
    assert bytes[".a"] <= 300 and bytes[".b"] <= 60 and bytes[".c"] <= 240 and sum(bytes.values()) > 500
    (home / "mixture.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="is damaged"):
        open_corpus(home)


def test_a_path_of_a_home_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths_by_source(["a=~/x"], shares_of(["a=1"])) == {"a": [str(tmp_path / "x")]}
