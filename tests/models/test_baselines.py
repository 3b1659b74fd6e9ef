"""The baselines that the papers measured themselves against: what is particular to each; the laws hold them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.models.linear import attention
from bytelm.models.linear import model as linear
from bytelm.models.linear.attention import LinearView, Sums
from bytelm.models.perceiver import model as perceiver
from bytelm.nn.attention import RowPositions
from bytelm.units import BOS

# --- linear attention -------------------------------------------------------------------------------------------------


def turned(x: Tensor, theta: float) -> Tensor:
    """RoFormer's rotation of `[time, head_dim]`, as complex numbers."""
    half = x.shape[1] // 2
    angles = torch.arange(len(x))[:, None].double() * theta ** -(torch.arange(half).double() / half)
    pairs = torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).flatten(1)


def recurrent(query: Tensor, keys: Tensor, values: Tensor, theta: float) -> Tensor:
    """Katharopoulos et al., eqs. 16-20, one position after another, of one head `[time, head_dim]`."""
    q, k = F.elu(query) + 1, F.elu(keys) + 1
    q_turned, k_turned = turned(q, theta), turned(k, theta)
    s, z, found = torch.zeros(q.shape[1], q.shape[1]).double(), torch.zeros(q.shape[1]).double(), list[Tensor]()
    for t in range(len(q)):
        s, z = s + torch.outer(k_turned[t], values[t]), z + k[t]
        found.append(q_turned[t] @ s / (q[t] @ z))
    return torch.stack(found)


def parallel(query: Tensor, keys: Tensor, values: Tensor, theta: float) -> Tensor:
    """The same as products of whole matrices, masked (eq. 8 with the feature map)."""
    q, k = F.elu(query) + 1, F.elu(keys) + 1
    weights = (turned(q, theta) @ turned(k, theta).T).tril()
    return weights @ values / (q @ k.T).tril().sum(1, keepdim=True)


@pytest.mark.parametrize("length", [1, 7, attention.CHUNK, attention.CHUNK + 1, 5 * attention.CHUNK - 3])
def test_both_forms_of_linear_attention_are_the_papers(length: int) -> None:
    """In float64 they differ by rounding alone, from each other and from ours: chunks of one, and the other between."""
    torch.manual_seed(length)
    theta, heads, dim = 100.0, 2, 6
    query, keys, values = torch.randn(3, 1, length, heads, dim).double()
    nowhere = RowPositions.zero(1)
    starts = torch.zeros(1, length, dtype=torch.bool)
    view = LinearView.of(torch.tensor([length]), starts, nowhere, dim, theta)
    ours, _ = view.attend(query, keys, values, None)
    for head in range(heads):
        inputs = (query[0, :, head], keys[0, :, head], values[0, :, head])
        one, other = recurrent(*inputs, theta), parallel(*inputs, theta)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours[0, :, head], one, rtol=0, atol=1e-6)  # turned in float32, as all rotations


@pytest.mark.parametrize("chunks", [1, 5, attention.STRETCH, 2 * attention.STRETCH + 3])
def test_sums_before_each_chunk_are_those_of_the_recurrence(chunks: int) -> None:
    """Slopes too; where a document ends, nothing goes on."""
    torch.manual_seed(0)
    added = torch.randn(2, chunks, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    totals = torch.rand(2, chunks, 3, 4, dtype=torch.float64)
    first = Sums(torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64))
    goes_on = (torch.rand(2, chunks) < 0.8).double()
    found, amounts, after = LinearView.running(added, totals, goes_on, first)
    s, z, wanted = first.products, first.keys, [first.products]
    for chunk in range(chunks):
        assert torch.allclose(amounts[:, chunk], z, rtol=1e-12)
        s = s * goes_on[:, chunk, None, None, None] + added[:, chunk]
        z = z * goes_on[:, chunk, None, None] + totals[:, chunk]
        wanted.append(s)
    assert torch.allclose(found, torch.stack(wanted[:-1], 1), rtol=1e-12)
    assert torch.allclose(after.products, s, rtol=1e-12) and torch.allclose(after.keys, z, rtol=1e-12)
    gradient = torch.randn_like(s)
    (ours,), (theirs,) = (torch.autograd.grad(x, added, gradient) for x in (after.products, s))
    assert torch.allclose(ours, theirs, rtol=1e-12)


def test_a_linear_state_does_not_grow() -> None:
    config = linear.Config(layers=1, dim=16, heads=2)
    model = config.build()
    model.init_weights(0)
    state = model.initial_state(1)
    for _ in range(3):
        _, state = model(torch.randint(0, 256, (1, 100)), state)
        assert [sums.products.shape for sums in state.sums] == [(1, 2, 8, 8)]
    assert int(state.where.position[0]) == 300


def test_sums_stay_in_float32_under_bfloat16() -> None:
    """In bfloat16 a sum over a thousand bytes would stand still."""
    view = LinearView.of(torch.tensor([1]), torch.zeros(1, 1, dtype=torch.bool), RowPositions.zero(1), 8, 1e4)
    one = torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)
    sums = Sums.zero(1, 2, 8, one.device)
    for _ in range(1000):
        _, after = view.attend(one, one, one, sums)
        assert after is not None
        sums = after
    torch.testing.assert_close(sums.keys, torch.full((1, 2, 8), 2000.0))


# --- PerceiverAR ------------------------------------------------------------------------------------------------------


def sees(model: nn.Module, length: int) -> list[str]:
    """Line i is the prediction after id i; `#` marks the ids that it depends on."""
    ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = BOS
    changed = ids.repeat(length, 1)
    changed[torch.arange(1, length), torch.arange(1, length)] = (ids[0, 1:] + 1) % 256
    with torch.no_grad():
        logits, others = model(ids)[0][0], model(changed)[0]
    return ["".join("#" if bool((o[t] != logits[t]).any()) else "." for o in others[1:]) for t in range(length)]


def perceiver_of(latents: int) -> perceiver.PerceiverAR:
    config = perceiver.Config(latents=latents, layers=2, dim=16, heads=2, ffn_multiple=16)
    model = config.build().double()
    model.init_weights(0)
    return model


def test_latents_see_their_own_block_and_inputs_see_all() -> None:
    """With its cross-attention silenced, a byte is predicted from its block alone: the picture of the limit."""
    model = perceiver_of(4)
    assert sees(model, 9)[-1] == "#" * 8
    silenced = model.cross.blocks[0].get_submodule("attention").get_submodule("out")
    nn.init.zeros_(silenced.get_parameter("weight"))
    assert sees(model, 9) == [
        "........",
        "#.......",
        "##......",
        "###.....",
        "...#....",
        "...##...",
        "...###..",
        "...####.",
        ".......#",
    ]


def test_a_perceivers_state_holds_one_block_of_latents() -> None:
    model = perceiver_of(4)
    state = model.initial_state(1)
    for step in range(11):
        _, state = model(torch.tensor([[step]]), state)
    assert state.cross[0].keys.shape[1] == 11
    assert all(cache.keys.shape[1] == 4 for cache in state.latents)
