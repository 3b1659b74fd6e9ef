"""The distribution that is sampled equals one computed by hand, and draws from it follow it, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytelm.errors import CheckpointError, ConfigError
from bytelm.generate.sampling import Sampling, draw, generators
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
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, VOCAB, generator=generator)
    allowed = torch.rand(2, VOCAB, generator=generator) < 0.5 if masked else torch.ones(2, VOCAB, dtype=torch.bool)
    expected = [by_hand([*map(float, logits[row])], sampling, [*map(bool, allowed[row])]) for row in range(2)]
    probabilities = sampling.filtered(logits, allowed if masked else None)
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_equal_logits_prefer_lower_ids() -> None:
    logits = torch.zeros(1, VOCAB)
    for sampling, kept in ((GREEDY, [0]), (Sampling(top_k=3), [0, 1, 2]), (Sampling(min_p=1.0), WRITTEN)):
        assert [*map(int, sampling.filtered(logits)[0].nonzero())] == kept


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [50.0, math.inf, math.nan])
def test_pad_bos_and_reserved_have_no_probability(temperature: float, value: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[:, [PAD, BOS, RESERVED]] = value
    probabilities = Sampling(temperature).filtered(logits)
    assert not probabilities[0, [PAD, BOS, RESERVED]].any()
    assert probabilities.sum().item() == pytest.approx(1)


def test_extreme_temperatures_stay_finite() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    cold, hot = Sampling(5e-324).filtered(logits), Sampling(1e300).filtered(logits)
    assert torch.equal(cold, GREEDY.filtered(logits))
    assert [*map(float, hot[0, WRITTEN])] == pytest.approx([1 / 257] * 257)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, 7] = value
    with pytest.raises(CheckpointError, match=f"peak at {value}.*not finite"):
        Sampling(temperature).filtered(logits)


def test_no_possible_id_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="peak at -inf"):
        Sampling().filtered(torch.full((1, VOCAB), -math.inf))


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


def spread(weights: dict[int, float]) -> Tensor:
    """One row of probabilities."""
    probabilities = torch.zeros(1, VOCAB, dtype=torch.float64)
    for i, weight in weights.items():
        probabilities[0, i] = weight
    return probabilities


@pytest.mark.parametrize("streams", [1, 10_000])
def test_draws_follow_the_probabilities(streams: int) -> None:
    weights, count = {0: 0.05, 65: 0.5, 66: 0.15, 255: 0.2, EOS: 0.1}, 10_000
    sources = generators(3, streams) * (count // streams)
    drawn = torch.bincount(draw(spread(weights).expand(count, -1), sources), minlength=VOCAB)
    assert sum(int(drawn[i]) for i in weights) == count
    chi_square = sum((int(drawn[i]) - count * p) ** 2 / (count * p) for i, p in weights.items())
    assert chi_square < 23.5  # four degrees of freedom: one in ten thousand is larger


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 2), (1 - 2**-53, 9)])
def test_the_ends_of_the_unit_interval_draw_possible_ids(
    uniform: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(*shape: int, **_: Any) -> Tensor:
        return torch.full(shape, uniform, dtype=torch.float64)

    monkeypatch.setattr(torch, "rand", fixed)
    for rest in (0.5, 0.25, 0.5 - 2**-53, 0.5 + 2**-52):  # the total may be a little off 1
        assert draw(spread({2: 0.5, 9: rest}), generators(0, 1)).item() == expected


def test_a_row_draws_from_its_own_generator_alone() -> None:
    probabilities = spread(dict.fromkeys(WRITTEN, 1 / 257))
    together, alone = generators(5, 3), generators(5, 3)
    rows = [draw(probabilities.expand(3, -1), together) for _ in range(20)]
    for row in range(3):
        assert [int(ids[row]) for ids in rows] == [int(draw(probabilities, [alone[row]])) for _ in range(20)]


def test_seeds_and_rows_have_streams_of_their_own() -> None:
    firsts = [float(torch.rand(1, generator=g)) for seed in range(-20, 20) for g in generators(seed, 20)]
    assert len(set(firsts)) == len(firsts)
    assert [g.initial_seed() for g in generators(1, 2)] == [g.initial_seed() for g in generators(1, 5)[:2]]
