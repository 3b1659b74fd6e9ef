"""Sums merge, intervals cover, and compressors are the ones that people know."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.errors import DataError
from bytelm.evaluate import meter
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.compressors import compressed
from bytelm.evaluate.meter import Meter, interval
from bytelm.units import LN2

sums = st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1e9)))


@given(st.tuples(sums, sums, sums))
def test_meters_merge_in_any_order(groups: tuple[list[tuple[int, float]], ...]) -> None:
    first, second, third = ([DocumentBits("", count, nats) for count, nats in group] for group in groups)
    a, b, c = Meter.of(first), Meter.of(second), Meter.of(third)
    assert a + b == b + a
    assert a + Meter() == a
    whole = Meter.of(first + second + third)
    assert whole == Meter.of(third + first + second)
    for merged in ((a + b) + c, a + (b + c)):
        assert merged.bytes == whole.bytes
        assert merged.nats == pytest.approx(whole.nats, rel=1e-15)


def test_a_meter_divides_sums() -> None:
    documents = [DocumentBits("", 1, 8 * LN2), DocumentBits("", 3, 0.0)]
    assert Meter.of(documents).bits_per_byte == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least one"):
        _ = Meter().bits_per_byte


def sample(generator: np.random.Generator, documents: int) -> list[DocumentBits]:
    """Documents whose bits per byte differ: the longer, the dearer."""
    sizes = generator.integers(100, 2000, documents)
    prices = 2.0 * (sizes / 1050) * generator.gamma(9, 1 / 9, documents)
    return [DocumentBits("", int(n), float(n * p * LN2)) for n, p in zip(sizes, prices, strict=True)]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(7)
    sizes = np.arange(100, 2000)
    truth = 2 / 1050 * (sizes**2).sum() / sizes.sum()
    for level in (0.5, 0.9):
        intervals = [interval(sample(generator, 60), level, resamples=200, seed=seed) for seed in range(150)]
        covered = np.mean([found is not None and found[0] <= truth <= found[1] for found in intervals])
        # Three standard errors of a share of 150, and what a bootstrap of 60 documents lacks.
        assert abs(covered - level) < 3 * math.sqrt(level * (1 - level) / 150) + 0.02


def test_an_interval_is_reproducible_and_holds_the_measured_value(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = sample(np.random.default_rng(8), 30)
    low, high = interval(documents) or (0.0, 0.0)
    assert low < Meter.of(documents).bits_per_byte < high
    assert interval(documents) == (low, high)
    assert interval(documents, seed=1) != (low, high)
    monkeypatch.setattr(meter, "AREA", 100)
    assert interval(documents) == (low, high)
    wider = interval(documents, level=0.99) or (0.0, 0.0)
    assert wider[0] < low < high < wider[1]


def test_an_interval_needs_two_documents_with_bytes() -> None:
    one, empty = DocumentBits("", 10, 20.0), DocumentBits("", 0, 0.0)
    assert interval([]) is None
    assert interval([one, empty, empty]) is None
    assert interval([one, one, empty]) == (pytest.approx(2 / LN2), pytest.approx(2 / LN2))


def test_compressors_give_the_sizes_that_their_programs_give() -> None:
    generator = np.random.default_rng(9)
    numbers = " ".join(map(str, generator.integers(0, 5000, 20_000))).encode()  # on which levels of effort differ
    documents = [numbers, generator.bytes(70_000), b"", bytes(50_000)]
    data = b"".join(documents)
    expected = {
        "gzip": len(gzip.compress(data, 9)),
        "bzip2": len(bz2.compress(data, 9)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    forms = [
        documents[0],
        [documents[1][:333], documents[1][333:]],
        documents[2],
        np.frombuffer(documents[3], np.uint8),
    ]
    assert compressed(forms) == pytest.approx(
        {name: 8 * size / len(data) for name, size in expected.items()}, rel=1e-12
    )


def test_nothing_cannot_be_compressed() -> None:
    with pytest.raises(DataError, match="0 bytes"):
        compressed([b"", b""])
