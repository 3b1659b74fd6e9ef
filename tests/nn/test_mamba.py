"""Mamba-2's layer against its recurrence written out, position by position, and against the one of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.nn.init_weights import init_weights
from bytelm.nn.mamba import CHUNK, DECAYS, STEPS, Mamba2, MambaConfig, MambaState, between
from bytelm.nn.state import take_rows

SHAPE = MambaConfig(dim=6, states=5, expand=2, convolution=4, head_dim=4)
LENGTH = 2 * CHUNK + 9


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal values in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(shape: MambaConfig = SHAPE, seed: int = 0) -> Mamba2:
    """One in float64 with random weights, of which all matter."""
    made = Mamba2(shape).double()
    init_weights(made, 1, seed)
    for index, parameter in enumerate(made.parameters()):
        parameter.data += 0.3 * random(*parameter.shape, seed=index)
    return made


def by_recurrence(made: Mamba2, x: Tensor, starts: set[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of one row `[new, dim]`; S and the inputs of the convolution at its end."""
    config, found = made.config, list[Tensor]()
    weight, bias = made.convolution.weight[:, 0], made.get_parameter("convolution.bias")
    sums = x.new_zeros(config.heads, config.head_dim, config.states)
    recent = x.new_zeros(config.convolution, config.channels)
    for t, one in enumerate(x):
        if t in starts:
            sums, recent = torch.zeros_like(sums), torch.zeros_like(recent)
        z, new, step = (made.project.weight @ one).split([config.inner, config.channels, config.heads])
        recent = torch.cat([recent[1:], new[None]])
        inner, b, c = F.silu((recent * weight.T).sum(0) + bias).split([config.inner, config.states, config.states])
        inner, step = inner.view(config.heads, -1), F.softplus(step + made.step_bias)
        kept = torch.exp(-step * made.log_decay.exp())
        sums = kept[:, None, None] * sums + step[:, None, None] * inner[..., None] * b
        y = ((sums @ c + made.skip[:, None] * inner).flatten()) * F.silu(z)
        y = y / (y.square().mean() + 1e-5).sqrt() * made.norm.weight
        found.append(made.out.weight @ y)
    return torch.stack(found), sums.flatten(0, 1), recent[1:]


def documents(starts: list[set[int]], new: int) -> Tensor:
    marks = torch.tensor([[t in row for t in range(new)] for row in starts])
    return marks.long().cumsum(1)


def nothing(rows: int) -> MambaState:
    return MambaState.zero(SHAPE, rows, torch.device("cpu"))


STARTS = [{0}, {0, 3, 4, CHUNK, CHUNK + 30}, {0, LENGTH - 2}]


@pytest.mark.parametrize("starts", [STARTS, [set[int](), {2 * CHUNK}, {1}]])
@torch.no_grad()
def test_both_forms_are_the_recurrence(starts: list[set[int]]) -> None:
    """Whole, in pieces and one by one, with documents that start anywhere; states at the end too."""
    made, x = layer(), random(3, LENGTH, SHAPE.dim, seed=9)
    wanted = [by_recurrence(made, row, own) for row, own in zip(x, starts, strict=True)]
    number = documents(starts, LENGTH)
    whole, none = made(x, number, torch.tensor([LENGTH] * 3), None)
    assert none is None
    for cuts in ([LENGTH], [1] * LENGTH, [2, 0, CHUNK, 1, LENGTH - CHUNK - 3], [CHUNK + 5, LENGTH - CHUNK - 5]):
        state: Any = nothing(3)
        found, at = list[Tensor](), 0
        for count in cuts:
            part = documents([{t - at for t in own} for own in starts], count)
            y, state = made(x[:, at : at + count], part, torch.tensor([count] * 3), state)
            found.append(y)
            at += count
        for given in (torch.cat(found, 1), whole):
            torch.testing.assert_close(given, torch.stack([one for one, _, _ in wanted]), rtol=0, atol=1e-12)
        torch.testing.assert_close(state.sums, torch.stack([one for _, one, _ in wanted]), rtol=0, atol=1e-12)
        torch.testing.assert_close(state.recent, torch.stack([one for _, _, one in wanted]), rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_of_unequal_counts_are_the_rows_alone() -> None:
    """What stands behind a row's last position changes nothing, and a row without a new one keeps its state."""
    made, lengths, new = layer(), torch.tensor([CHUNK + 3, 0, 2]), CHUNK + 7
    five = documents([{0}] * 3, 5)
    _, before = made(random(3, 5, SHAPE.dim, seed=5), five, torch.tensor([5] * 3), nothing(3))
    x, number = random(3, new, SHAPE.dim, seed=4), documents([{10}, set(), {1}], new)
    y, after = made(x, number, lengths, before)
    assert after is not None
    for row, length in enumerate(lengths.tolist()):
        own, one = slice(row, row + 1), torch.tensor([row])
        alone, state = made(x[own, :length], number[own, :length], lengths[own], take_rows(before, one))
        assert state is not None
        torch.testing.assert_close(y[row, :length], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(after.sums[own], state.sums, rtol=0, atol=1e-12)
        torch.testing.assert_close(after.recent[own], state.recent, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_state_does_not_grow_with_what_was_read() -> None:
    """Of a constant input S is at most its own share, Δ x Bᵀ, of all positions that have not decayed."""
    made, x = layer(), random(1, 1, SHAPE.dim).expand(1, 50 * CHUNK, -1)
    state: Any = nothing(1)
    sizes = list[Tensor]()
    for part in x.split(25 * CHUNK, 1):
        _, state = made(part, documents([set()], part.shape[1]), torch.tensor([part.shape[1]]), state)
        sizes.append(state.sums.abs().max())
    torch.testing.assert_close(sizes[1], sizes[0], rtol=1e-6, atol=0)
    assert state.recent.shape == (1, SHAPE.convolution - 1, SHAPE.channels)


def test_a_small_decay_is_not_lost_behind_a_large_one() -> None:
    """A difference of two sums of a million would be off by a tenth in float32."""
    decay = torch.tensor([-1e6, -1e-3, -2e-3])
    found = between(decay)
    assert found[2, 1] == decay[2] and found[1, 0] == decay[1] and found[2, 0] == decay[1] + decay[2]
    assert not found.triu().any()


def test_under_autocast_all_but_the_products_is_in_float32() -> None:
    made = layer().float()
    x = random(1, 70, SHAPE.dim).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = made(x, documents([{0}], 70), torch.tensor([70]), nothing(1))
    assert state is not None and state.sums.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        projected = made.project(x)
    _, wanted = made.mix(projected.float(), documents([{0}], 70), torch.tensor([70]), None)
    torch.testing.assert_close(state.sums, wanted.sums, rtol=0, atol=0)


@torch.no_grad()
def test_initial_steps_and_decays_are_in_their_ranges() -> None:
    made = Mamba2(MambaConfig(dim=512, states=4, head_dim=1))
    init_weights(made, 1, 3)
    step, decay = F.softplus(made.step_bias), made.log_decay.exp()
    for values, (low, high) in ((step, STEPS), (decay, DECAYS)):
        assert low * 0.999 < float(values.min()) < low * 1.2 and high * 0.98 < float(values.max()) < high * 1.001
    assert bool((made.skip == 1).all()) and not made.get_parameter("convolution.bias").any()
    assert float(step.median()) == pytest.approx(1e-2, rel=0.3)  # uniform in its logarithm
    assert float(made.convolution.weight.std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"states": 0}, "here: states 0 must be at least 1"),
        ({"head_dim": 5}, "here: heads of 5 do not divide 2 times the width 6"),
    ],
)
def test_impossible_shapes(change: dict[str, int], words: str) -> None:
    assert MambaConfig(**{**vars(SHAPE), **change}).problems("here") == [words]
    assert SHAPE.problems("here") == []


@torch.no_grad()
def test_it_is_the_layer_of_transformers() -> None:
    """In one pass, and, by its cache, one position after another."""
    pytest.importorskip("transformers")
    from transformers import DynamicCache, Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    shape = MambaConfig(dim=8, states=6, expand=2, convolution=4, head_dim=4)
    made = layer(shape)
    config: Any = Mamba2Config(
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        hidden_size=shape.dim,
        state_size=shape.states,
        num_hidden_layers=1,
        n_groups=1,
        expand=shape.expand,
        conv_kernel=shape.convolution,
        layer_norm_epsilon=1e-5,
        chunk_size=16,
    )
    theirs: Any = Mamba2Mixer(config, 0).double().eval()
    theirs.load_state_dict(
        {
            "in_proj.weight": made.project.weight,
            "conv1d.weight": made.convolution.weight,
            "conv1d.bias": made.convolution.bias,
            "dt_bias": made.step_bias,
            "A_log": made.log_decay,
            "D": made.skip,
            "norm.weight": made.norm.weight,
            "out_proj.weight": made.out.weight,
        }
    )
    x = random(2, 83, shape.dim, seed=2)
    ours, _ = made(x, documents([{0}] * 2, 83), torch.tensor([83, 83]), None)
    # Its steps are kept in float32, so that float64 is not reached.
    torch.testing.assert_close(theirs(x), ours, rtol=0, atol=1e-5)
    cache = DynamicCache(config=config)
    found = [
        theirs(x[:, :70], cache_params=cache),
        *(theirs(x[:, t : t + 1], cache_params=cache) for t in range(70, 83)),
    ]
    torch.testing.assert_close(torch.cat(found, 1), ours, rtol=0, atol=1e-5)
