"""H-Net: what is particular to it; the invariants of `testing` hold it as any other architecture."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bytelm.decoding import open_decoder
from bytelm.errors import ConfigError
from bytelm.evaluate import patches, stream
from bytelm.evaluate.costs import usual_mean
from bytelm.interfaces.objective import score, with_auxiliary
from bytelm.models.hnet import stage as hnet
from bytelm.models.hnet.chunking import REACH, Router, ratio_loss, smoothed, straight_through
from bytelm.models.hnet.model import Config, HNet
from bytelm.models.hnet.stage import MOST
from bytelm.native import library
from bytelm.testing.examples import document
from bytelm.training import lengths
from bytelm.training.settings import configure, describe
from bytelm.units import BOS, EOS, PAD


def tiny(shape: str = "one stage", **changes: Any) -> HNet:
    model = replace(Config.tiny()[shape], **changes).build()
    model.init_weights(0)
    return model


def line(length: int, seed: int = 0) -> Tensor:
    return torch.tensor([[BOS, *random.Random(seed).randbytes(length - 1)]])


# --- dynamic chunking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 3 * REACH])
def test_smoothing_is_the_recurrence(length: int) -> None:
    torch.manual_seed(length)
    chunks, before = torch.randn(2, length, 3).double(), torch.randn(2, 3).double()
    chance = 0.5 + torch.rand(2, length).double() / 2
    z, wanted = before, list[Tensor]()
    for t in range(length):
        z = chance[:, t, None] * chunks[:, t] + (1 - chance[:, t, None]) * z
        wanted.append(z)
    none = torch.zeros(2, length, dtype=torch.bool)
    torch.testing.assert_close(smoothed(chunks, chance, none, before), torch.stack(wanted, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("most", [1.0, MOST])
def test_smoothing_forgets_where_a_document_starts(most: float) -> None:
    """Whose first chunk is certain, or nearly, and has nothing of the one before."""
    chunks = torch.randn(1, 4, 2)
    chance, starts = torch.tensor([[0.7, 0.6, most, 0.8]]), torch.tensor([[False, False, True, False]])
    found, other = (smoothed(chunks, chance, starts, torch.full((1, 2), fill)) for fill in (0.0, 1e9))
    torch.testing.assert_close(found[:, 2:], other[:, 2:])
    torch.testing.assert_close(found[:, 2], most * chunks[:, 2])
    assert not torch.equal(found[:, :2], other[:, :2])


def test_probabilities_are_half_of_one_minus_the_cosine() -> None:
    torch.manual_seed(0)
    router = Router(4)
    x, before = torch.randn(1, 3, 4), torch.randn(1, 4)
    starts = torch.tensor([[False, False, True]])
    probability, key = router(x, starts, before)
    keys = x[0] @ router.key.weight.T
    torch.testing.assert_close(key[0], keys)
    for t, previous in enumerate([before[0], keys[0]]):
        query = router.query.weight @ x[0, t]
        cosine = (query @ previous) / (query.norm() * previous.norm())
        torch.testing.assert_close(probability[0, t], (1 - cosine) / 2)
    assert probability[0, 2] == 1
    router.init_weights()
    same, _ = router(x[:, :1].expand(-1, 2, -1), starts[:, :2], x[:, 0])
    torch.testing.assert_close(same, torch.zeros(1, 2), rtol=0, atol=1e-6)  # what repeats itself opens nothing


def test_boundaries_are_not_decided_in_bfloat16() -> None:
    torch.manual_seed(0)
    router, x = Router(8), torch.randn(1, 50, 8)
    exact, _ = router(x, torch.zeros(1, 50, dtype=torch.bool), x[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = router(x, torch.zeros(1, 50, dtype=torch.bool), x[:, 0])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_ratio_loss_is_one_at_its_target_and_of_each_row_alone() -> None:
    real = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    opens = torch.tensor([[True, False, False, False], [True, True, False, False], [False] * 4])
    probability = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.9, 0.6, 0.5, 0.5], [0.3] * 4])
    found = ratio_loss(probability, opens, real, 4.0)
    f, g = 1.0, 0.75  # of the second row, whose last two positions are not there
    torch.testing.assert_close(found, torch.tensor([1.0, 4 / 3 * (3 * f * g + (1 - f) * (1 - g)), 0.0]))


def test_straight_through_is_one_with_a_slope() -> None:
    x = torch.tensor([0.6, 0.9], requires_grad=True)
    y = straight_through(x)
    (y * torch.tensor([2.0, 3.0])).sum().backward()
    assert y.tolist() == [1, 1]
    assert x.grad is not None and x.grad.tolist() == [2, 3]


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", Config.tiny())
def test_the_loss_of_bytes_trains_the_routers(shape: str) -> None:
    """Through the smoothing and the straight-through confidence, not the ratio loss alone."""
    model = tiny(shape, ratio_weight=0.0)
    for stage in model.chunking_stages():
        torch.nn.init.normal_(stage.residual.weight, std=0.1)
    score(model, line(80))[0].backward()
    for stage in model.chunking_stages():
        for part in (stage.router.query, stage.router.key):
            assert part.weight.grad is not None and part.weight.grad.abs().max() > 1e-6


def test_every_document_of_a_row_opens_a_chunk() -> None:
    model = tiny()
    ids = torch.tensor([[BOS, *b"aaaa", EOS, BOS, *b"aaaaaa", EOS, BOS, *b"aa"]])
    model(ids)
    assert model.chunking is not None
    assert bool(model.chunking.opens[ids == BOS].all())
    assert model.chunking.counts[0].tolist() == [int(model.chunking.opens.sum())]


def test_the_auxiliary_sum_is_that_of_its_rows() -> None:
    """So that micro-batches and processes minimise what one batch does."""
    model = tiny("two stages, n-grams")
    rows = [line(30), line(12, 1), line(25, 2)]
    batch = torch.full((3, 30), PAD)
    for row, ids in enumerate(rows):
        batch[row, : ids.shape[1]] = ids
    sums = list[Tensor]()
    for ids in (batch, *batch.split(1)):
        nats, _ = score(model, ids)
        sums.append(with_auxiliary(model, nats) - nats)
    assert sums[0] > 0
    torch.testing.assert_close(sums[0], sum(sums[1:], torch.zeros(())), rtol=1e-4, atol=1e-4)


def test_the_auxiliary_sum_is_weighted_by_the_ids_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hnet, "ratio_loss", lambda probability, *_: torch.ones(len(probability)))
    model = tiny("two stages, n-grams", ratio_weight=0.25)
    model(torch.tensor([[BOS, *b"abcdef", PAD], [BOS, *b"ab", PAD, PAD, PAD, PAD, PAD]]))
    assert model.chunking is not None and model.chunking.auxiliary is not None
    assert float(model.chunking.auxiliary) == 0.25 * 2 * (7 + 3)


def test_after_a_state_there_is_nothing_to_train() -> None:
    model = tiny()
    model(line(5), model.initial_state(1))
    assert model.chunking is not None and model.chunking.auxiliary is None
    nats = torch.ones(())
    assert with_auxiliary(model, nats) is nats


def test_a_model_is_copied_without_the_graph_of_its_newest_pass() -> None:
    model = tiny()
    score(model, line(20))
    other = deepcopy(model)
    assert model.chunking is not None and other.chunking is None
    assert torch.equal(other(line(20))[0], model(line(20))[0])


def test_the_ratio_loss_leads_to_the_target() -> None:
    model = tiny(ratios=(4.0,), ratio_weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids = torch.cat([line(200, seed) for seed in range(4)])
    for _ in range(60):
        nats, _ = score(model, ids)
        (with_auxiliary(model, nats) - nats.detach()).div(ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model(ids)
    assert model.chunking is not None
    assert 3.0 < 1 / model.chunking.opens.float().mean() < 5.0


# --- its patches elsewhere --------------------------------------------------------------------------------------------


def test_patches_of_a_document_are_those_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 32)
    model = tiny()
    for seed in range(50):  # one whose first byte the model reads in the patch of BOS
        data = document(random.Random(seed), 150)
        model(torch.tensor([[BOS, *data]]))
        assert model.chunking is not None
        if not model.chunking.opens[0, 1]:
            break
    assert not model.chunking.opens[0, 1]
    wanted = model.chunking.opens[0, 1:].numpy().copy()
    wanted[0] = True
    found = patches.patch_view(model, bytes(data))
    np.testing.assert_array_equal(found.opens, wanted)
    assert found.entropies is None
    kinds = patches.lengths_by_kind(model, [("txt", bytes(data))])
    assert kinds["txt"].total() == wanted.sum() and sum(n * c for n, c in kinds["txt"].items()) == len(data)


@pytest.mark.skipif(library.library("kernels") is None, reason="no kernels")
@pytest.mark.parametrize("shape", [name for name, one in Config.tiny().items() if not one.published])
def test_a_decoder_opens_what_the_forward_pass_does_at_every_stage(shape: str) -> None:
    model, ids = tiny(shape).double(), line(150)
    with torch.no_grad():
        model(ids)
    decoder = open_decoder(model, rows=2, capacity=150)
    for part in ids[0].split([1, 70, 79]):
        decoder.read(np.ones(len(part), np.int64), part.numpy())
    assert model.chunking is not None
    depth = model.chunking.depth[0].numpy()
    np.testing.assert_array_equal(decoder.depth(1), depth)
    assert depth.max() == len(model.config.ratios) and 0 in depth
    assert [int(count) for count in model.chunking.counts] == [(depth > stage).sum() for stage in range(depth.max())]


def test_lengths_of_a_step_are_between_its_boundaries() -> None:
    ids = torch.tensor([[BOS, *b"abcdef"], [BOS, *b"abc", PAD, PAD, PAD]])
    opens = torch.tensor([[1, 0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0]]).bool()
    count, found = lengths.learned(ids, opens)
    assert count == 3  # BOS is no byte
    assert found.tolist()[:4] == [0, 0, 1, 0]  # "bcd"; what the edges of a window cut is left out


def test_costs_before_training_are_at_the_target() -> None:
    recipe = configure("hnet-tiny", steps=1).recipe
    assert usual_mean(recipe) == 5.0
    assert describe("hnet-tiny")["patching"] == "learned"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": ()}, r"model.ratios = \[\]: give at least one"),
        ({"ratios": (1.0,)}, r"model.ratios = \[1.0\]: must be above 1, and finite"),
        ({"ratios": (3.0, 3.0)}, r"model.dims = \[16, 32\]: 2 stages of model.ratios need 3"),
        ({"dims": (32, 16)}, r"model.dims = \[32, 16\]: no inner network may be narrower"),
        ({"ratio_weight": -1.0}, r"model.ratio_weight = -1.0: must be at least 0"),
        ({"layers": 0}, r"layers = \[1, 2, 0\]: must be at least 1"),
        ({"heads": (3, 2)}, "3 heads do not divide width 16"),
    ],
)
def test_impossible_shapes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Config.tiny()["one stage"], **changes)
