"""The sampler: every id is predicted once an epoch, by a pure function of (seed, step, rank, world)."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.data.boundaries import BoundaryWriter
from bytelm.data.corpus import Corpus, Split, iterate_documents
from bytelm.data.pack import pack
from bytelm.data.sampler import Sampler, permuted
from bytelm.errors import DataError
from bytelm.units import BOS, EOS, PAD


def packed(folder: str | Path, contents: list[bytes], **options: object) -> Corpus:
    source = Path(folder, "source")
    source.mkdir()
    for number, content in enumerate(contents):
        (source / f"{number:03d}").write_bytes(content)
    return pack([source], Path(folder, "packed"), **options)  # type: ignore[arg-type]


def stream(corpus: Corpus, split: Split) -> list[int]:
    return [i for _, data in iterate_documents(corpus, split) for i in (BOS, *data.tolist(), EOS)]


CONTENTS = [np.random.default_rng(n).bytes(n) for n in (1, 300, 2, 41, 700, 3, 90, 90)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return packed(tmp_path_factory.mktemp("corpus"), CONTENTS, valid=0.2, test=0.2, shard_bytes=111)


def test_the_picture_in_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = packed(tmp_path, [b"abc", b"de"], valid=0.0, test=0.0)
    monkeypatch.setattr("bytelm.data.sampler._keys", lambda seed, epoch: [2, *range(6)])
    rows = Sampler(corpus, "train", window=4, batch=3, seed=0).batch(0).ids.tolist()
    b, e = BOS, EOS
    expected = [[98, 99, e, b, 100], [100, 101, e, b, 97], [97, 98, PAD, PAD, PAD]]
    assert sorted(rows) == sorted(expected)


@settings(max_examples=40)
@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=8),
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(0, 100),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.3]),
)
def test_every_id_is_predicted_exactly_once_in_an_epoch(
    contents: list[bytes], window: int, shard_bytes: int, seed: int, epoch: int, held_out: float
) -> None:
    with tempfile.TemporaryDirectory() as name:
        # train keeps documents that do not lie side by side: reading on over a gap would show it what is held out
        corpus = packed(name, contents, valid=held_out, test=held_out, shard_bytes=50 * shard_bytes)
        ids = stream(corpus, "train")
        ring = Counter(zip(ids, ids[1:] + ids[:1], strict=True))
        sampler = Sampler(corpus, "train", window, 1, seed)
        assert sampler.ids == len(ids)
        first = epoch * sampler.windows
        rows = [sampler.batch(step).ids[0] for step in range(first, first + sampler.windows)]
        pairs = Counter((int(a), int(b)) for row in rows for a, b in pairwise(row) if b != PAD)
        assert pairs == ring
        twice = 3 * ids
        for row in rows:
            real = row[row != PAD].tolist()
            assert (row[len(real) :] == PAD).all() and len(real) >= 2  # padded at the end, never empty
            assert any(twice[i : i + len(real)] == real for i in range(len(ids)))
        assert sampler.epoch_of(first) == sampler.epoch_of(first + sampler.windows - 1) == epoch


def test_the_aligned_picture_in_the_docstring(tmp_path: Path) -> None:
    corpus = packed(tmp_path, [b"abcde", b"f"], valid=0.0, test=0.0)
    sampler = Sampler(corpus, "train", window=4, batch=3, seed=0, aligned=True)
    b, e, p = BOS, EOS, PAD
    assert sorted(sampler.batch(0).ids.tolist()) == sorted([[b, *b"abcd"], [*b"de", e, p, p], [b, *b"f", e, p, p]])


@settings(max_examples=40)
@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=8),
    st.integers(1, 70),
    st.integers(0, 100),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.3]),
)
def test_aligned_windows_predict_each_id_once_and_never_look_beyond_their_document(
    contents: list[bytes], window: int, seed: int, epoch: int, held_out: float
) -> None:
    with tempfile.TemporaryDirectory() as name:
        corpus = packed(name, contents, valid=held_out, test=held_out)
        expected: list[tuple[int, ...]] = []
        for _, data in iterate_documents(corpus, "train"):
            ids = (BOS, *data.tolist(), EOS)
            cuts = [ids[at : at + window + 1] for at in range(0, len(ids) - 1, window)]
            assert sum(len(cut) - 1 for cut in cuts) == len(ids) - 1
            expected += [cut + (PAD,) * (window + 1 - len(cut)) for cut in cuts]
        sampler = Sampler(corpus, "train", window, 1, seed, aligned=True)
        assert sampler.windows == len(expected)
        first = epoch * sampler.windows
        found = [tuple(sampler.batch(step).ids[0].tolist()) for step in range(first, first + sampler.windows)]
        assert sorted(found) == sorted(expected)
        assert sampler.epoch_of(first) == sampler.epoch_of(first + sampler.windows - 1) == epoch


@settings(max_examples=30)
@given(st.integers(1, 300), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_the_permutation_is_one(count: int, keys: list[int]) -> None:
    assert sorted(permuted(index, count, keys) for index in range(count)) == list(range(count))


def test_the_permutation_scatters_and_holds_for_large_ranges() -> None:
    keys = [11, 22, 33, 44, 55, 66]
    order = np.array([permuted(index, 1000, keys) for index in range(1000)])
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert (np.diff(order) == 1).sum() < 10
    count = 10**12 + 39
    images = {permuted(index, count, keys) for index in range(1000)}
    assert len(images) == 1000 and all(0 <= image < count for image in images)


@settings(max_examples=40)
@given(
    st.integers(0, 400),
    st.sampled_from([(2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]),
    st.integers(1, 200),
    st.booleans(),
)
def test_ranks_together_see_what_one_alone_would(
    corpus: Corpus, step: int, shape: tuple[int, int], window: int, aligned: bool
) -> None:
    world, batch = shape
    alone = Sampler(corpus, "train", window, world * batch, seed=7, aligned=aligned).batch(step).ids
    samplers = [Sampler(corpus, "train", window, batch, 7, rank, world, aligned=aligned) for rank in range(world)]
    shared = [sampler.batch(step).ids for sampler in samplers]
    np.testing.assert_array_equal(alone, np.concatenate(shared))


@pytest.mark.parametrize("aligned", [False, True])
def test_a_batch_depends_on_seed_and_step_alone(corpus: Corpus, aligned: bool) -> None:
    one, two = (Sampler(corpus, "train", 16, 4, seed=3, aligned=aligned) for _ in range(2))
    forward = [one.batch(step).ids for step in range(100)]
    for step in reversed(range(100)):
        np.testing.assert_array_equal(two.batch(step).ids, forward[step])
    assert not np.array_equal(Sampler(corpus, "train", 16, 4, seed=4, aligned=aligned).batch(0).ids, forward[0])
    assert forward[0].dtype == np.int64 and forward[0].shape == (4, 17)
    assert one.batch(0).boundaries is None


def test_each_epoch_has_its_own_order_and_phase(corpus: Corpus) -> None:
    sampler = Sampler(corpus, "train", 16, 1, seed=3)
    epochs = [
        [tuple(sampler.batch(epoch * sampler.windows + step).ids[0].tolist()) for step in range(sampler.windows)]
        for epoch in range(4)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) > 1
    for epoch in epochs:
        assert sum(one[-1] == two[0] for one, two in pairwise(epoch)) < sampler.windows / 4  # not in order of the ring


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_boundaries_stay_with_their_bytes(corpus: Corpus, split: Split, aligned: bool) -> None:
    with BoundaryWriter(corpus.directory, "f" * 64, corpus.total) as writer:
        for _, data in iterate_documents(corpus):
            writer.write(data >= 128)
        boundaries = writer.finish()
    for window in (1, 7, 64, 5000):
        sampler = Sampler(corpus, split, window, 5, seed=1, boundaries=boundaries, aligned=aligned)
        for step in range(20):
            batch = sampler.batch(step)
            ids = batch.ids
            expected = np.where(ids < 256, ids >= 128, ids != PAD)
            np.testing.assert_array_equal(batch.boundaries, expected)


def test_what_cannot_be_sampled_is_refused(tmp_path: Path) -> None:
    corpus = packed(tmp_path, [b"only one"])
    with pytest.raises(DataError, match=r"valid split .* is empty"):
        Sampler(corpus, "valid", 4, 1, 0)
    with BoundaryWriter(tmp_path, "f" * 64, 3) as writer:
        writer.write(np.ones(3, bool))
        other = writer.finish()
    with pytest.raises(DataError, match="3 bytes of boundaries do not fit 8"):
        Sampler(corpus, "train", 4, 1, 0, boundaries=other)
    for wrong in ({"window": 0}, {"batch": 0}, {"rank": 1}, {"rank": -1}):
        with pytest.raises(ValueError, match="no windows"):
            Sampler(corpus, "train", **({"window": 4, "batch": 1, "seed": 0} | wrong))
