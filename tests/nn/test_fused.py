"""The kernels of training against plain float64: values and slopes, over shapes that reach every edge of a tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.models.blt import model as blt
from bytelm.models.megabyte import model as megabyte
from bytelm.models.transformer import entropy_model
from bytelm.models.transformer import model as transformer
from bytelm.nn import fused
from bytelm.nn.attention import CausalPattern, RowPositions
from bytelm.nn.products import product
from bytelm.nn.rope import rotation
from bytelm.nn.transformer import Stack
from bytelm.patching import fixed
from bytelm.units import BOS, PAD
from processors import OLDER, PROCESSORS, runs, used

pytestmark = pytest.mark.usefixtures("training_kernels")

KINDS = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-20}  # norms of errors come to less


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-6))


def compare(
    fast: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: Sequence[Tensor], near: float = 0
) -> None:
    """Values and slopes agree up to what the kind of the first input rounds away."""
    near = near or ROUNDING[inputs[0].dtype]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    found, wanted = fast(*ours), exact(*theirs)
    gradient = torch.randn(found.shape).to(found.dtype)
    found.backward(gradient)
    wanted.backward(gradient.double())
    assert error(found, wanted) < near
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert error(one.grad, other.grad) < near


def attention(query: Tensor, keys: Tensor, values: Tensor, first: Tensor) -> Tensor:
    queries, slots = query.shape[1], keys.shape[1]
    slot = torch.arange(slots)
    last = slots - queries + torch.arange(queries)[:, None]
    seen = ((slot >= first[..., None]) & (slot <= last))[:, None]
    scores = torch.einsum("bqhd,bshd->bhqs", query, keys) * query.shape[-1] ** -0.5
    return torch.einsum("bhqs,bshd->bqhd", scores.masked_fill(~seen, -math.inf).softmax(-1), values)


@pytest.mark.parametrize(
    ("rows", "queries", "slots", "heads", "dim", "window"),
    [
        (2, 300, 300, 3, 64, 50),
        (1, 1100, 1100, 2, 32, 400),  # in stretches that add to the same keys
        (1, 1030, 1100, 1, 128, 10**6),
        (40, 8, 8, 3, 64, 99),  # patches
        (20, 8, 16, 3, 16, 99),
        (2, 70, 133, 1, 48, 77),
        (3, 1, 5, 2, 16, 9),
    ],
)
def test_attention(kind: torch.dtype, rows: int, queries: int, slots: int, heads: int, dim: int, window: int) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(rows, slots, 3, heads, dim).to(kind).unbind(2)
    own = slots - queries + torch.arange(queries)
    first = (own - window + 1).clamp(min=0).repeat(rows, 1)
    documents = torch.randint(0, queries, (rows, 1)) * (torch.arange(rows)[:, None] % 2)  # where some rows start anew
    first = torch.where(own - own[0] >= documents, torch.maximum(first, documents), first).int()
    compare(
        lambda q, k, v: fused.attention(q, k, v, first),
        lambda q, k, v: attention(q, k, v, first),
        [query[:, :queries], keys, values],
    )


def test_attention_of_strided_inputs_is_that_of_copies(kind: torch.dtype) -> None:
    query, keys, values = torch.randn(2, 100, 3, 2, 32).to(kind).unbind(2)
    first = torch.zeros(1, 100, dtype=torch.int32)
    copies = [x.contiguous() for x in (query, keys, values)]
    assert torch.equal(fused.attention(query, keys, values, first), fused.attention(*copies, first))


def test_any_number_of_threads_gives_the_same_bits(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 1300, 2, 32).to(kind).requires_grad_() for _ in range(3)]
    first = torch.zeros(1, 1300, dtype=torch.int32)
    found: list[list[Tensor]] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = fused.attention(*inputs, first)
            found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("low", [False, True])
def test_norm(kind: torch.dtype, low: bool) -> None:
    """What products read next is in bfloat16 if they are."""
    if kind == torch.bfloat16 and not low:
        pytest.skip("torch's own: the norm of bfloat16 is in float32 there")
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        x, weight = torch.randn(33, 5, 48).to(kind), torch.rand(48)
        assert fused.rms_norm(x, weight, 1e-5).dtype == (torch.bfloat16 if low else kind)
        near = ROUNDING[torch.bfloat16 if low else kind]
        compare(
            lambda x, weight: fused.rms_norm(x, weight, 1e-5),
            lambda x, weight: F.rms_norm(x, (48,), weight, 1e-5),
            [x, weight],
            near,
        )


def test_swiglu(kind: torch.dtype) -> None:
    torch.manual_seed(0)

    def exact(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    compare(fused.swiglu, exact, [30 * torch.randn(9, 7, 96).to(kind)])  # so large that e^x would overflow


def test_rotate(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    cosines, sines = rotation(torch.arange(150).view(3, 50), 32, 1e4)

    def exact(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], -1).flatten(-2)

    compare(lambda x: fused.rotate(x, cosines, sines), exact, [torch.randn(3, 50, 3, 2, 32).to(kind).unbind(2)[1]])


def patched(count: int, patches: int) -> Tensor:
    """Which patch bytes go with; some patches have none, and the last bytes no patch."""
    patch = torch.sort(torch.randint(0, patches, (count,))).values
    patch[-4:] = patches
    return patch


def test_patches_query_their_bytes(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    patch = patched(100, 40)

    def exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.einsum("pkhd,shd->pkhs", query, keys) * 32**-0.5
        own = patch == torch.arange(40)[:, None, None, None]
        weights = scores.masked_fill(~own, -math.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("pkhs,shd->pkhd", weights, values)

    compare(
        lambda q, k, v: fused.cross(q, k, v, patch),
        exact,
        [torch.randn(shape).to(kind) for shape in ((40, 2, 3, 32), (100, 3, 32), (100, 3, 32))],
    )


def test_bytes_query_their_patch(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    patch = patched(100, 40).clamp(max=39)

    def exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        weights = (torch.einsum("shd,skhd->shk", query, keys[patch]) * 32**-0.5).softmax(-1)
        return torch.einsum("shk,skhd->shd", weights, values[patch])

    compare(
        lambda q, k, v: fused.cross(q, k, v, patch),
        exact,
        [torch.randn(shape).to(kind) for shape in ((100, 3, 32), (40, 2, 3, 32), (40, 2, 3, 32))],
    )


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("cached", [0, 40])
def test_a_view_shows_the_kernel_what_it_shows_the_mask(kind: torch.dtype, window: int | None, cached: int) -> None:
    """The run of slots that kernels are told, and the mask, dense or in blocks, that everything else uses."""
    torch.manual_seed(0)
    starts = torch.zeros(2, 200, dtype=torch.bool)
    starts[0, 90] = True
    where = RowPositions(torch.tensor([cached, cached + 7]), torch.tensor([cached // 2, 3]))
    view = CausalPattern.of(torch.tensor([200, 200]), starts, where, cached, window, 32, 1e4)
    query, keys, values = (torch.randn(2, new, 2, 32) for new in (200, 200 + cached, 200 + cached))
    wanted = attention(query.double(), keys.double(), values.double(), view.first)
    assert error(view.over(query.double(), keys.double(), values.double()), wanted) < 1e-12  # goes by the mask
    rounded = [x.to(kind) for x in (query, keys, values)]
    assert error(view.over(*rounded), attention(*(x.double() for x in rounded), view.first)) < ROUNDING[kind]


WIDE = {"sizes": (8,), "dims": (96, 64), "layers": (2, 2), "heads": (3, 2)}
MODELS: dict[str, Callable[[], ByteModel]] = {
    "transformer": transformer.Config(layers=2, dim=64, heads=2).build,
    "windowed": transformer.Config(layers=2, dim=64, heads=2, attention_window=70).build,
    "megabyte": megabyte.Config(**WIDE).build,
    "megabyte linked": megabyte.Config(**WIDE, reach=8, filters=(3,)).build,
    "megabyte 3": megabyte.Config(sizes=(4, 4), dims=(96, 64, 32), layers=(1, 1, 1), heads=(3, 2, 1), reach=2).build,
    "megabyte across": megabyte.Config(**WIDE, local_window=70, ngram_sizes=(3,), ngram_rows=50).build,
    "blt": lambda: blt.Config(local_dim=64, global_dim=96, global_heads=3, global_layers=2, ngram_rows=50).build(
        fixed.Config(size=5).build()
    ),
    "blt, all crossed": lambda: blt.Config(
        local_dim=64, global_dim=128, global_layers=1, ngram_rows=50, encoder_layers=2, encoder_cross="all"
    ).build(fixed.Config(size=3).build()),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_as_good_as_in_plain_torch(
    kind: torch.dtype, name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nats and slopes of both against float64: the kernels are not farther from it than torch is."""
    model = MODELS[name]()
    model.init_weights(0)
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = recompute
    ids = torch.randint(0, 256, (3, 260), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = ids[1, 100] = BOS  # a document that starts within a row,
    ids[2, 150:] = PAD  # and one that ends early

    def step(model: ByteModel, kernels: bool) -> Tensor:
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            if not kernels:
                patch.setattr(fused, "ready", lambda kind: False)
            model.zero_grad()
            nats, _ = score(model, ids)
            nats.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([nats.detach()[None], *gradients])

    torchs, ours = step(model, False), step(model, True)
    kind, near = torch.float64, ROUNDING[kind] / 4
    exact = step(model.double(), False)
    assert abs(ours[0] / exact[0] - 1) < near
    assert error(ours[1:], exact[1:]) < 1.2 * error(torchs[1:], exact[1:]) + near
    assert error(ours[1:], torchs[1:]) > 0  # another path was taken


def test_scores_far_below_the_highest_weigh_nothing(kind: torch.dtype) -> None:
    """By hundreds of powers of two, past what a float's exponent can say."""
    torch.manual_seed(0)
    query, keys, values = (by * torch.randn(1, 70, 2, 32).to(kind) for by in (30, 30, 1))
    first = torch.zeros(1, 70, dtype=torch.int32)
    found = fused.attention(query, keys, values, first)
    assert error(found, attention(query.double(), keys.double(), values.double(), first)) < 100 * ROUNDING[kind]


def test_what_is_not_a_number_stays_so() -> None:
    """Even one whose every bit is set, to which nothing can be added without its becoming a number."""
    x = torch.full((1, 16), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert fused.rms_norm(x, torch.ones(16), 1e-5).isnan().all()


@pytest.mark.parametrize("low", [False, True])
def test_products_by_another_library_are_the_same(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is the faster one here; of lines in any layout. Where products are in bfloat16, torch's are."""
    torch.manual_seed(0)
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(fused, "_onednn_multiplies", lambda: True)
    inputs = [torch.randn(70, 3, 48).transpose(0, 1), torch.randn(33, 48)]
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        assert fused.multiplies(inputs[0], inputs[1]) != low and not fused.multiplies(inputs[0][:1, :3], inputs[1])
        compare(product, lambda x, weight: x @ weight.t(), inputs, ROUNDING[torch.bfloat16 if low else torch.float32])


def test_what_was_decided_by_the_bits_of_torch_alone_still_is() -> None:
    """The entropy model, by whose float32 boundaries were recorded, uses no kernel; a model of bytes does."""
    x = torch.randn(2, 100, 64)
    assert fused.fits(x) and fused.attends(x, 32)
    with fused.plain():
        assert not fused.fits(x) and not fused.attends(x, 32) and not fused.multiplies(x, x[0])
    assert fused.fits(x)
    entropy = entropy_model.Config(dim=64, heads=2).build()
    entropy.model.init_weights(0)
    ids = torch.randint(0, 256, (2, 100))
    found, _ = entropy.entropies(ids, entropy.initial_state(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "ready", lambda kind: False)
        assert torch.equal(found, entropy.entropies(ids, entropy.initial_state(2))[0])


def test_processors_that_multiply_and_add_at_once_give_the_same_bits(kind: torch.dtype) -> None:
    """AVX2 and AVX-512: vectors have the same lanes, and every sum the same order."""
    if PROCESSORS == ["native"] or not runs(OLDER):
        pytest.skip("one processor only")
    torch.manual_seed(0)
    x = torch.randn(1, 150, 3, 2, 32).to(kind)
    angles = rotation(torch.arange(150)[None], 32, 1e4)
    found: list[list[Tensor]] = []
    for processor in ("native", OLDER):
        with used(processor):
            inputs = [part.clone().requires_grad_() for part in x.unbind(2)]
            turned = fused.rotate(inputs[0], *angles)
            mixed = fused.attention(turned, *inputs[1:], torch.arange(150, dtype=torch.int32)[None] // 2)
            normed = fused.rms_norm(mixed.float().flatten(2), torch.ones(64), 1e-5)
            out = fused.swiglu(normed.to(kind))
            found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
