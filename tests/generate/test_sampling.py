"""The distribution that is sampled equals one computed by hand, and draws from it follow it, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bytelm.errors import CheckpointError, ConfigError
from bytelm.generate.sampling import Sampling, draw, row_key, uniform
from bytelm.units import BOS, BYTES, EOS, PAD, RESERVED, VOCAB

GREEDY = Sampling(temperature=0.0)
WRITTEN = [*range(BYTES), EOS]


def by_hand(logits: list[float], sampling: Sampling, allowed: list[bool]) -> list[float]:
    """The distribution of one row, from the definitions, in Python floats."""
    ids = [i for i in WRITTEN if allowed[i]]
    ids.sort(key=lambda i: (-logits[i], i))
    if sampling.temperature == 0:
        return [float(i == ids[0]) for i in range(VOCAB)]
    weights = {i: math.exp((logits[i] - logits[ids[0]]) / sampling.temperature) for i in ids}
    ids = ids[: sampling.top_k]
    if sampling.top_p is not None:
        target, nucleus, mass = sampling.top_p * math.fsum(weights[i] for i in ids), list[int](), 0.0
        while mass < target and len(nucleus) < len(ids):
            nucleus.append(ids[len(nucleus)])
            mass = math.fsum(weights[i] for i in nucleus)
        ids = nucleus
    if sampling.min_p is not None:
        ids = [i for i in ids if weights[i] >= sampling.min_p * weights[ids[0]]]
    total = math.fsum(weights[i] for i in ids)
    return [weights[i] / total if i in ids else 0.0 for i in range(VOCAB)]


@given(
    seed=st.integers(0, 2**32),
    sampling=st.builds(
        Sampling,
        temperature=st.just(0.0) | st.floats(0.1, 3),
        top_k=st.none() | st.integers(1, 300),
        top_p=st.none() | st.floats(0.01, 0.999),
        min_p=st.none() | st.floats(0.001, 0.9),
    ),
    masked=st.booleans(),
)
def test_filtered_is_the_definition(seed: int, sampling: Sampling, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((2, VOCAB), np.float32)
    allowed = rng.random((2, VOCAB)) < 0.5 if masked else np.ones((2, VOCAB), bool)
    expected = [by_hand([*map(float, logits[row])], sampling, [*map(bool, allowed[row])]) for row in range(2)]
    probabilities = sampling.filtered(logits, allowed if masked else None)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-9, atol=0)


def test_equal_logits_prefer_lower_ids() -> None:
    logits = np.zeros((1, VOCAB))
    for sampling, kept in ((GREEDY, [0]), (Sampling(top_k=3), [0, 1, 2]), (Sampling(min_p=1.0), WRITTEN)):
        assert sampling.filtered(logits)[0].nonzero()[0].tolist() == kept


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [50.0, math.inf, math.nan])
def test_pad_bos_and_reserved_have_no_probability(temperature: float, value: float) -> None:
    logits = np.zeros((1, VOCAB))
    logits[:, [PAD, BOS, RESERVED]] = value
    probabilities = Sampling(temperature).filtered(logits)
    assert not probabilities[0, [PAD, BOS, RESERVED]].any()
    assert probabilities.sum().item() == pytest.approx(1)


def test_extreme_temperatures_stay_finite() -> None:
    logits = np.random.default_rng(0).standard_normal((1, VOCAB))
    cold, hot = Sampling(5e-324).filtered(logits), Sampling(1e300).filtered(logits)
    assert np.array_equal(cold, GREEDY.filtered(logits))
    assert hot[0, WRITTEN].tolist() == pytest.approx([1 / 257] * 257)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = np.zeros((2, VOCAB))
    logits[1, 7] = value
    with pytest.raises(CheckpointError, match=f"peak at {value}.*not finite"):
        Sampling(temperature).filtered(logits)


def test_no_possible_id_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="peak at -inf"):
        Sampling().filtered(np.full((1, VOCAB), -math.inf))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("temperature", [-0.1, math.inf, math.nan]),
        ("top_k", [0, -1]),
        ("top_p", [0.0, 1.1, -0.5, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
    ],
)
def test_values_outside_their_limits_are_named(option: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"{option} {value} "):
            Sampling(**{option: value})  # pyright: ignore[reportArgumentType]


def spread(weights: dict[int, float]) -> NDArray[np.float64]:
    """One row of probabilities."""
    probabilities = np.zeros((1, VOCAB))
    for i, weight in weights.items():
        probabilities[0, i] = weight
    return probabilities


def chi_square(drawn: NDArray[np.int64], weights: dict[int, float]) -> float:
    """How far counts of draws are from their probabilities."""
    counts = np.bincount(drawn, minlength=VOCAB)
    assert sum(int(counts[i]) for i in weights) == len(drawn)
    return sum((int(counts[i]) - len(drawn) * p) ** 2 / (len(drawn) * p) for i, p in weights.items())


COUNT = 10_000
WEIGHTS = {0: 0.05, 65: 0.5, 66: 0.15, 255: 0.2, EOS: 0.1}


@pytest.mark.parametrize("streams", [1, COUNT])
def test_draws_follow_the_probabilities(streams: int) -> None:
    keys = np.array([row_key(3, row) for row in range(streams)], np.uint64).repeat(COUNT // streams)
    drawn = draw(spread(WEIGHTS).repeat(COUNT, 0), keys, np.arange(COUNT))
    assert chi_square(drawn, WEIGHTS) < 23.5  # four degrees of freedom: one in ten thousand is larger


def test_draws_at_neighbouring_positions_and_of_neighbouring_rows_know_nothing_of_each_other() -> None:
    fair = {i: 1 / 16 for i in range(16)}
    keys = np.full(COUNT, row_key(0, 0), np.uint64)
    first = draw(spread(fair).repeat(COUNT, 0), keys, np.arange(COUNT))
    for other in (
        draw(spread(fair).repeat(COUNT, 0), keys, np.arange(1, COUNT + 1)),
        draw(spread(fair).repeat(COUNT, 0), np.full(COUNT, row_key(0, 1), np.uint64), np.arange(COUNT)),
    ):
        pairs = {i: 1 / 256 for i in range(256)}
        assert chi_square(16 * first + other, pairs) < 350  # 255 degrees of freedom: one in ten thousand is larger


@pytest.mark.parametrize("value", [2.0**-53, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_possible_ids(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytelm.generate.sampling.uniform", lambda keys, positions, ids: np.full((1, VOCAB), value))
    keys, positions = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    assert draw(spread({2: 0.25, 9: 0.75}), keys, positions).item() == 9
    assert draw(spread({2: 1e-300, 9: 5e-324}), keys, positions).item() == 2


def test_uniform_numbers_are_inside_their_interval_and_fill_it() -> None:
    found = uniform(np.arange(400, dtype=np.uint64), np.arange(400))
    assert 0 < found.min() < 1e-4 and 1 - 1e-4 < found.max() < 1
    counts = np.bincount((found.ravel() * 100).astype(int), minlength=100)
    assert ((counts - found.size / 100) ** 2 / (found.size / 100)).sum() < 160  # 99 degrees of freedom


def test_a_row_draws_by_its_own_key_and_position_alone() -> None:
    probabilities = spread(dict.fromkeys(WRITTEN, 1 / 257))
    keys, positions = np.array([row_key(5, row) for row in range(3)], np.uint64), np.array([7, 0, 10**6])
    together = draw(probabilities.repeat(3, 0), keys, positions)
    alone = [int(draw(probabilities, keys[i : i + 1], positions[i : i + 1])[0]) for i in range(3)]
    assert together.tolist() == alone
    assert [draw(probabilities.repeat(3, 0), keys, positions + i).tolist() for i in range(20)].count(alone) == 1


def test_distributions_that_are_nearly_the_same_draw_nearly_the_same() -> None:
    """The coupling agrees at least (1 - d) / (1 + d) of the time, d being the total variation distance."""
    near = {0: 0.1, 65: 0.45, 66: 0.15, 255: 0.2, EOS: 0.1}
    distance = sum(abs(WEIGHTS[i] - near[i]) for i in near) / 2
    keys = np.array([row_key(1, row) for row in range(COUNT)], np.uint64)
    one, other = (draw(spread(p).repeat(COUNT, 0), keys, np.zeros(COUNT, np.int64)) for p in (WEIGHTS, near))
    assert (one == other).mean() > (1 - distance) / (1 + distance) - 0.01


def test_seeds_and_rows_have_keys_of_their_own() -> None:
    keys = [row_key(seed, row) for seed in range(-20, 20) for row in range(20)]
    assert len(set(keys)) == len(keys)
