"""The layers against their definitions written out plainly: dense masks, softmaxes in float64, integers without an end.

A tolerance comes from a reference: ours may be twice as far from float64 as plain PyTorch in the same precision is.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.errors import ConfigError
from bytelm.models.blt import model as blt
from bytelm.models.blt.cross import BytesFromPatches, PatchesFromBytes
from bytelm.models.blt.pool import segment_max, segment_sum
from bytelm.nn import attention, rope
from bytelm.nn.attention import CausalPattern, Mask, RowPositions
from bytelm.nn.cross import CrossAttention
from bytelm.nn.init_weights import init_weights
from bytelm.nn.ngrams import PRIMES, NgramEmbedding
from bytelm.nn.rope import rotate, rotation
from bytelm.nn.state import join_rows, put_rows, take_rows
from bytelm.patching.layout import Rows
from bytelm.testing.pretend import AWAY, pretend
from bytelm.transfer import to_device, to_host
from bytelm.units import BOS, PAD


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal values in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).square().mean().sqrt())


# --- attention --------------------------------------------------------------------------------------------------------

HEADS, HEAD_DIM = 2, 8
STARTS = {"one document": [[], []], "several": [[0, 9, 30], [17]]}


def dense_mask(starts: Tensor, cached: int, position: int, window: int | None) -> Tensor:
    """What query t of a row sees, slot by slot, as the words say it: `[batch, new, cached + new]`."""
    batch, new = starts.shape
    mask = torch.zeros(batch, new, cached + new, dtype=torch.bool)
    for row in range(batch):
        start = 0
        for query in range(new):
            here = position + query
            start = here if starts[row, query] else start
            for slot in range(cached + new):
                there = position - cached + slot
                mask[row, query, slot] = start <= there <= here and (window is None or here - there < window)
    return mask


def softmax_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over what the mask shows."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) / math.sqrt(HEAD_DIM)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", STARTS)
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("cached", [0, 3])
@pytest.mark.parametrize("block", [8, 128])
def test_attention_is_a_softmax_over_what_the_mask_shows(
    dtype: torch.dtype, documents: str, window: int | None, cached: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    new, cached = 35, min(cached, window or cached)
    starts = torch.zeros(2, new, dtype=torch.bool)
    for row, places in enumerate(STARTS[documents]):
        starts[row, places] = True
    where = RowPositions(torch.full((2,), cached), torch.zeros(2, dtype=torch.long))
    view = CausalPattern.of(torch.tensor([new, new]), starts, where, cached, window, HEAD_DIM, 1e4)
    assert bool(view.block) == (window is not None and new > block)
    query = random(2, new, HEADS, HEAD_DIM)
    keys, values = (random(2, cached + new, HEADS, HEAD_DIM, seed=s) for s in (1, 2))
    mask = dense_mask(starts, cached, cached, window)
    wanted = softmax_attention(query, keys, values, mask)
    q, k, v = (x.to(dtype) for x in (query, keys, values))
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None])
    assert distance(view.over(q, k, v), wanted) <= 2 * distance(plain.transpose(1, 2), wanted)
    assert distance(view.over(query, keys, values), wanted) < 1e-14


@pytest.mark.parametrize("slots", [8, 32, 33])
def test_short_lines_are_plain_products_on_a_gpu(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert (attention.few("cuda"), attention.few("cpu")) == (32, 0)
    assert attention.few("cpu") == attention.PRODUCTS
    monkeypatch.setattr(attention, "few", lambda device: 32)
    asked: list[int] = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **how: asked.append(1) or plain(*x, **how))
    query, keys, values = (random(3, slots, HEADS, HEAD_DIM, seed=s) for s in range(3))
    none = Mask(None, slots, torch.device("cpu"))
    wanted = attention.mix(query, keys, values, none)
    found = attention.mix(*(x.bfloat16() for x in (query, keys, values)), none)
    assert len(asked) == (1 if slots <= 32 else 2)
    assert distance(found, wanted) < 0.02


def test_a_view_keeps_what_the_next_call_can_see() -> None:
    where = RowPositions(torch.tensor([7, 2]), torch.tensor([0, 0]))
    starts = torch.zeros(2, 4, dtype=torch.bool)
    windowed = CausalPattern.of(torch.tensor([4, 1]), starts, where, 5, 5, HEAD_DIM, 1e4)
    assert (windowed.keep, windowed.after.position.tolist()) == (5, [11, 3])
    assert CausalPattern.of(torch.tensor([4, 1]), starts, where, 7, None, HEAD_DIM, 1e4).keep == 11


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_rotation_turns_a_score_by_the_distance_alone(position: int, shift: int) -> None:
    """At positions in the millions too, which angles in float32 would not survive."""
    query, key = random(1, 1, 1, HEAD_DIM), random(1, 1, 1, HEAD_DIM, seed=1)

    def scored(offset: int) -> Tensor:
        turns = (rotation(torch.tensor([[offset + p]]), HEAD_DIM, 1e4) for p in (position, position + 3))
        q, k = (rotate(x.float(), by) for x, by in zip((query, key), turns, strict=True))
        return (q * k).sum()

    assert abs(float(scored(shift) - scored(0))) < 1e-5


def test_the_first_numbers_of_a_head_turn_as_a_narrower_head_does() -> None:
    positions, x = torch.arange(5)[None], random(1, 5, 2, HEAD_DIM).float()
    for turned in (0, 4, HEAD_DIM):
        found = rotate(x, rotation(positions, HEAD_DIM, 1e4, turned))
        assert torch.equal(found[..., turned:], x[..., turned:])
        if turned:
            torch.testing.assert_close(found[..., :turned], rotate(x[..., :turned], rotation(positions, turned, 1e4)))


def test_angles_are_exact_where_a_device_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made on the host, and travel."""
    monkeypatch.setattr(rope, "WITHOUT_FLOAT64", AWAY.type)
    positions = torch.tensor([[0, 3, 10_000_000]])
    with pretend() as seen:
        found = [to_host(x) for x in rotation(to_device(positions, AWAY), HEAD_DIM, 1e4)]
    assert all(torch.equal(x, y) for x, y in zip(found, rotation(positions, HEAD_DIM, 1e4), strict=True))
    assert not {"cos", "sin", "mul"} & set(seen.launches)


def test_rows_that_stand_alike_share_their_angles() -> None:
    """And rows that do not turn by their own."""
    starts, lengths = torch.zeros(3, 4, dtype=torch.bool), torch.tensor([4, 4, 4])
    for positions, rows in (([5, 5, 5], 1), ([5, 5, 6], 3)):
        where = RowPositions(torch.tensor(positions), torch.zeros(3, dtype=torch.long))
        angles = CausalPattern.of(lengths, starts, where, 0, None, HEAD_DIM, 1e4).rotation
        wanted = rotation(torch.tensor(positions)[:, None] + torch.arange(4), HEAD_DIM, 1e4)
        for found, exact in zip(angles, wanted, strict=True):
            assert len(found) == rows and torch.equal(found.expand_as(exact), exact)


# --- cross-attention and pooling --------------------------------------------------------------------------------------


def dense_cross(layer: CrossAttention, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Every query over all keys that the mask `[queries, keys]` shows; a query that sees none adds nothing."""
    query, key, value = layer.project(queries, keys)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    return 2 * queries + layer.out(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_attend_their_own_bytes(dtype: torch.dtype) -> None:
    """Patches of 0, 1 and several bytes, and bytes of no patch."""
    layer = PatchesFromBytes(16, 2)
    init_weights(layer, 1, 0)
    layer.requires_grad_(False)
    segment = torch.tensor([0, 0, 0, 1, 3, 3, 4, 4, 3])
    queries, bytes = random(4, 3, 16), random(9, 16, seed=1)
    mask = (segment == torch.arange(4)[:, None]).repeat_interleave(3, 0)
    wanted = dense_cross(layer.double(), queries.flatten(0, 1), bytes, mask).view(4, 3, 16)
    layer.to(dtype)
    plain = dense_cross(layer, queries.to(dtype).flatten(0, 1), bytes.to(dtype), mask).view(4, 3, 16)
    found = layer(queries.to(dtype), bytes.to(dtype), segment)
    assert distance(found, wanted) <= 2 * distance(plain, wanted)
    assert torch.equal(found[2], 2 * queries.to(dtype)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_attend_one_patch(dtype: torch.dtype) -> None:
    layer = BytesFromPatches(16, 2)
    init_weights(layer, 1, 0)
    layer.requires_grad_(False)
    index = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 1, 0]])
    queries, patches = random(2, 5, 16), random(2, 3, 2, 16, seed=1)
    mask = (index[..., None] == torch.arange(3)).repeat_interleave(2, -1)

    def dense(dtype: torch.dtype) -> Tensor:
        layer.to(dtype)
        rows = zip(queries.to(dtype), patches.to(dtype), mask, strict=True)
        return torch.stack([dense_cross(layer, q, p.flatten(0, 1), m) for q, p, m in rows])

    wanted, plain = dense(torch.float64), dense(dtype)
    found = layer(queries.to(dtype), patches.to(dtype), index)
    assert distance(found, wanted) <= 2 * distance(plain, wanted)


@given(st.lists(st.integers(0, 3), max_size=9))
def test_segments_are_reduced_one_by_one(segments: list[int]) -> None:
    values, segment = random(len(segments), 2), torch.tensor(segments, dtype=torch.long)
    for number in range(4):
        own = values[segment == number]
        highest = own.amax(0) if len(own) else torch.full((2,), -torch.inf)
        assert torch.equal(segment_max(values, segment, 4)[number], highest.double())
        torch.testing.assert_close(segment_sum(values, segment, 4)[number], own.sum(0))


# --- hashed n-grams ---------------------------------------------------------------------------------------------------

SIZES, FUNCTIONS, TABLE = (2, 3, 8), 2, 997


def hashed(document: list[int]) -> list[list[int]]:
    """The table rows at each id of one document, in integers that are wrapped as two's complement at the end."""
    found = list[list[int]]()
    for end in range(1, len(document) + 1):
        line = list[int]()
        for prime in PRIMES[:FUNCTIONS]:
            for size in SIZES:
                ids = ([PAD] * size + document[:end])[-size:]
                total = sum((i + 4) % 260 * prime**power for power, i in enumerate(ids))
                wrapped = (total + 2**63) % 2**64 - 2**63
                line.append(wrapped % TABLE + len(line) * TABLE)
        found.append(line)
    return found


def embedding() -> NgramEmbedding:
    return NgramEmbedding(8, SIZES, FUNCTIONS, TABLE)


def test_the_hash_is_the_published_one() -> None:
    """Golden values of "ab" after BOS: 1, 101, 102 once specials come first, oldest id first; the second one wraps."""
    rows = Rows.of(torch.tensor([[BOS, *b"ab"]]))
    found = embedding().hashes(rows.ids, rows.starts(torch.tensor([0])), torch.full((1, 7), PAD))[0]
    assert found[2, :2].tolist() == [(101 + 102 * 1000000007) % TABLE, 1923]
    assert found.tolist() == hashed([BOS, *b"ab"])


@given(st.lists(st.binary(max_size=12).map(lambda b: [BOS, *b]), max_size=4), st.data())
def test_hashes_are_those_of_each_document_alone(documents: list[list[int]], data: st.DataObject) -> None:
    """Over document starts, and over the edges of pieces with PADs in them."""
    layer, line = embedding(), [i for document in documents for i in document]
    recent, position, found = layer.initial_state(1), 0, list[list[int]]()
    while line:
        size, before, behind = data.draw(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 2)))
        piece, line = line[:size], line[size:]
        rows = Rows.of(torch.tensor([[PAD] * before + piece + [PAD] * behind], dtype=torch.long))
        starts = rows.starts(torch.tensor([position]))
        found += layer.hashes(rows.ids, starts, recent)[0, : len(piece)].tolist()
        recent = layer.reached(rows, starts, recent)
        position += len(piece)
    assert found == [hashes for document in documents for hashes in hashed(document)]


def test_tables_do_not_share_rows() -> None:
    layer = embedding()
    assert layer.ngram is not None
    assert layer.ngram.num_embeddings == FUNCTIONS * len(SIZES) * TABLE
    rows = Rows.of(torch.tensor([[BOS, *range(256)]]))
    found = layer.hashes(rows.ids, rows.starts(torch.tensor([0])), layer.initial_state(1))[0]
    assert torch.equal(found // TABLE, torch.arange(6).expand(257, 6))


def test_what_is_behind_an_embedding_is_of_n_grams_alone() -> None:
    """Of rows twice as wide: the first halves embed as rows of one width do, the second know no byte."""
    wide, narrow = NgramEmbedding(8, SIZES, FUNCTIONS, TABLE, parts=2).double(), embedding().double()
    assert wide.ngram is not None and narrow.ngram is not None
    rows = Rows.of(torch.tensor([[BOS, *b"ab, ab", PAD, BOS, *b"ab"]]))
    place = (rows.ids, rows.starts(torch.tensor([0])), wide.initial_state(1))
    with torch.no_grad():
        narrow.byte.weight.copy_(wide.byte.weight)
        narrow.ngram.weight.copy_(wide.weight[:, :8])
        found = wide(*place)
        torch.testing.assert_close(found[..., :8], narrow(*place))
        torch.testing.assert_close(found[..., 8:], wide.weight[:, 8:][wide.hashes(*place)].sum(-2))
    with pytest.raises(ConfigError, match=r"ngram_output = true needs tables: set model\.ngram_sizes"):
        blt.Config(ngram_output=True, ngram_sizes=())


# --- states and parameters --------------------------------------------------------------------------------------------


def test_rows_of_a_state_are_taken_joined_and_put() -> None:
    """Times of different length are aligned on the right, where the newest is."""
    long, short = torch.arange(6.0).view(2, 3), torch.tensor([[9.0]])
    state = (RowPositions(torch.tensor([3, 4]), torch.tensor([0, 1])), long, None)
    other = (RowPositions(torch.tensor([7]), torch.tensor([2])), short, None)
    where, line, nothing = join_rows([state, other])
    assert (where.position.tolist(), line.tolist(), nothing) == ([3, 4, 7], [[0, 1, 2], [3, 4, 5], [0, 0, 9]], None)
    where, line, _ = take_rows(state, torch.tensor([1, 1, 0]))
    assert (where.start.tolist(), line.tolist()) == ([1, 1, 0], [[3, 4, 5], [3, 4, 5], [0, 1, 2]])
    where, line, _ = put_rows(state, torch.tensor([0]), other)
    assert (where.position.tolist(), line.tolist()) == ([7, 4], [[0, 0, 9], [3, 4, 5]])
    assert state[1].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_parameters_begin_as_the_table_says() -> None:
    model = nn.ModuleDict({"in": nn.Linear(400, 300, bias=False), "out": nn.Linear(400, 300, bias=False)})
    model.update({"embed": nn.Embedding(300, 100), "norm": nn.RMSNorm(5)})
    init_weights(model, 8, 0)
    model.requires_grad_(False)
    cut = 0.9867  # what is left of σ once normals are cut at 3 σ
    for name, sigma in (("in", 1 / 20), ("out", 1 / 80), ("embed", 1 / 10)):
        weight = model.get_parameter(f"{name}.weight")
        assert abs(float(weight.std()) / (sigma * cut) - 1) < 0.02
        assert float(weight.abs().max()) <= 3 * sigma
    assert model.get_parameter("norm.weight").tolist() == [1] * 5


def test_a_kind_that_the_table_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="conv: no rule to initialise a Conv2d"):
        init_weights(nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}), 1, 0)
