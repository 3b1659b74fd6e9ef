"""The kernels of a GPU against plain float64, and compiled for GPUs that are not here.

Where there is a GPU they run on it. Elsewhere they are interpreted, in float32: the interpreter cuts off what bfloat16
cannot hold, where a GPU rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.models.blt import model as blt
from bytelm.models.blt.pool import run_maxima
from bytelm.models.linear import model as linear
from bytelm.models.megabyte import model as megabyte
from bytelm.models.transformer import model as transformer
from bytelm.nn import fused
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.nn.norm import RMSNorm
from bytelm.nn.rope import rotate, rotate_two, rotation
from bytelm.nn.rows import sum_rows
from bytelm.nn.transformer import swiglu
from bytelm.patching import fixed
from bytelm.units import BOS, PAD, VOCAB

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernels")]

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KINDS = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
SHAPES = [(1, 1), (1, 7), (3, 48), (1037, 6), (70, 130), (5, 1500), (3, 2048)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """They are asked wherever they can work, on a GPU or not; in float64 plain torch is."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for a GPU")
    from bytelm.nn import device_kernels

    monkeypatch.setattr(fused, "kernels", lambda x: device_kernels if x.dtype in fused.KINDS and x.numel() else None)
    return device_kernels


@contextmanager
def poisoned() -> Iterator[None]:
    """What is not written is no number."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().cpu().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-6))


def compare(run: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
    """Values and slopes agree with those of float64."""
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = run(*exact)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    # Not in the order of their axes, as some operators hand slopes on.
    gradients = [torch.randn(y.shape[::-1]).permute(*reversed(range(y.ndim))) for y in wanted]
    wanted = [*wanted, *torch.autograd.grad(wanted, exact, [gradient.double() for gradient in gradients])]
    with poisoned():
        ours = [x.to(DEVICE).detach().requires_grad_() for x in inputs]
        found = run(*ours)
        found = found if isinstance(found, tuple) else (found,)
        moved = [gradient.to(y) for gradient, y in zip(gradients, found, strict=True)]
        found = [*found, *torch.autograd.grad(found, ours, moved)]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert error(one, other) < CLOSE[one.dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lines", "width"), SHAPES[1:])  # the slope of a norm of one number is rounding alone
def test_norm(lines: int, width: int, kind: torch.dtype, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # so that each sums many lines

    def run(x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return F.rms_norm(x, (width,), weight, 1e-5)
        return kernels.rms_norm(x, weight, 1e-5, x.dtype)

    compare(run, [3 * torch.randn(lines, width).to(kind), torch.rand(width)])


def test_a_norm_is_rounded_where_products_are(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "norm_fits", lambda x: False)
    norm, x = RMSNorm(48).to(DEVICE), torch.randn(5, 48, device=DEVICE)
    assert norm(x).dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert error(norm(x), norm.double()(x.double()).cpu()) < CLOSE[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lines", "width"), SHAPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of an interpreted sigmoid, which is then 0
def test_swiglu(lines: int, width: int, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    compare(swiglu, [30 * torch.randn(lines, 2 * width).to(kind)])  # so large that e^x would overflow


def angled(rows: int, new: int, head_dim: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(rows * new).view(rows, new)
    cosines, sines = rotation(positions, head_dim, 1e4)
    return cosines.to(DEVICE), sines.to(DEVICE)


TURNED = [(1, 1, 1, 2), (2, 9, 3, 6), (3, 50, 2, 32), (2, 40, 24, 64)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "new", "heads", "dim"), TURNED)
def test_queries_and_keys_turn(rows: int, new: int, heads: int, dim: int, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    by = angled(rows, new, dim)
    here = tuple(x.cpu() for x in by)
    qkv = torch.randn(rows, new, 3, heads, dim).to(kind)
    compare(lambda x: rotate_two(x, here if x.dtype == torch.float64 else by), [qkv])


@pytest.mark.parametrize("angles", [(3, 50), (1, 50), (1, 1)])
def test_one_tensor_turns(angles: tuple[int, int]) -> None:
    """At any strides, all rows or places by the same angles or not."""
    torch.manual_seed(0)
    by = angled(*angles, 32)
    here = tuple(x.cpu() for x in by)
    compare(lambda x: rotate(x.transpose(1, 2), here if x.dtype == torch.float64 else by), [torch.randn(3, 2, 50, 32)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [5, 128, 700])
def test_run_maxima(width: int, kind: torch.dtype) -> None:
    """Some runs have no slot; between them stand slots that are of none."""
    torch.manual_seed(0)
    segment = torch.tensor([0, 0, 9, 9, 2, 2, 2, 3, 9, 5, 5, *[6] * 50, 8, 9])
    values = torch.randn(len(segment), width).to(kind) - 3  # most are below the 0 of empty runs
    values = values + 1e-3 * torch.arange(len(segment))[:, None].to(kind)
    if kind == torch.bfloat16:  # of equal numbers torch takes all
        values = torch.stack([torch.randperm(len(segment)) for _ in range(width)], 1).to(kind) - 99
    compare(lambda x: run_maxima(x, segment.to(x.device), 9), [values])


def test_what_is_not_a_number_stays_so() -> None:
    values = torch.tensor([[1.0], [float("nan")], [2.0], [3.0]], device=DEVICE)
    found = run_maxima(values, torch.tensor([0, 0, 0, 1], device=DEVICE), 2)
    assert found[0].isnan() and found[1] == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [6, 32, 100])
@pytest.mark.parametrize("patches_ask", [True, False])
def test_cross_attention(patches_ask: bool, dim: int, kind: torch.dtype, kernels: ModuleType) -> None:
    """Some patches have no byte, one has many; bytes of none are not seen."""
    torch.manual_seed(0)
    segment = torch.tensor([0, 0, 2, 2, 2, 3, 5, 5, *[6] * 50, 8, 9])
    segment = segment if patches_ask else segment.clamp(max=8)
    own = segment == torch.arange(9)[:, None]

    def run(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if query.dtype != torch.float64:
            return kernels.cross(query, keys, values, segment.to(query.device))
        if patches_ask:
            scores = torch.einsum("pkhd,shd->pkhs", query, keys) * dim**-0.5
            weights = scores.masked_fill(~own[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
            return torch.einsum("pkhs,shd->pkhd", weights, values)
        weights = (torch.einsum("shd,skhd->shk", query, keys[segment]) * dim**-0.5).softmax(-1)
        return torch.einsum("shk,skhd->shd", weights, values[segment])

    patches, bytes = (9, 2, 3, dim), (len(segment), 3, dim)
    query, others = (patches, bytes) if patches_ask else (bytes, patches)
    compare(run, [torch.randn(shape).to(kind) for shape in (query, others, others)])


@pytest.mark.parametrize(("sizes", "functions", "rows"), [((3, 4, 5, 6, 7, 8), 1, 8192), ((5, 2, 3), 11, 2**33 + 7)])
def test_hashes(sizes: tuple[int, ...], functions: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the last bit, over starts of documents, before the first id, and past what 64 bits hold."""
    torch.manual_seed(0)
    monkeypatch.setattr(nn, "Embedding", lambda *shape: nn.Identity())  # tables are not looked into
    embed = NgramEmbedding(4, sizes, functions, rows)
    ids = torch.randint(0, VOCAB, (3, 400))
    starts = torch.rand(3, 400) < 0.2
    recent = torch.randint(0, VOCAB, (3, embed.reach))
    with poisoned():
        found = embed.hashes(*(x.to(DEVICE) for x in (ids, starts, recent)))
    monkeypatch.setattr(fused, "kernels", lambda x: None)
    assert torch.equal(found.cpu(), embed.hashes(ids, starts, recent))


@pytest.mark.parametrize(("bags", "width"), [(1, 1), (70, 130), (33, 1500)])
def test_sums_of_rows(bags: int, width: int) -> None:
    torch.manual_seed(0)
    table, index = torch.randn(50, width), torch.randint(0, 50, (bags, 6))
    with poisoned():
        found = sum_rows(table.to(DEVICE), index.to(DEVICE))
    assert error(found, F.embedding_bag(index, table.double(), mode="sum")) < 1e-6


def test_rows_behind_the_first_two_billion_numbers() -> None:
    width, rows = 1024, 2**21 + 8
    table = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)  # 4 GB, of which two rows are touched
    table[-1], table[7] = 3, 5
    found = sum_rows(table, torch.tensor([[rows - 1, 7], [7, 7]], device=DEVICE))
    assert found[0].eq(8).all() and found[1].eq(10).all()


MODELS: dict[str, Callable[[], ByteModel]] = {
    "transformer": transformer.Config(layers=2, dim=32, heads=2).build,
    "linear": linear.Config(layers=1, dim=32, heads=2).build,
    "megabyte": megabyte.Config(sizes=(4,), dims=(48, 32), layers=(1, 1), heads=(3, 2)).build,
    "blt": lambda: blt.Config(local_dim=32, global_dim=48, global_heads=3, global_layers=1, ngram_rows=50).build(
        fixed.Config(size=5).build()
    ),
}
OFTEN = {"norm", "norm_back", "swiglu", "swiglu_back", "turn"}
CROSSED = {"attend_run", "attend_parts", "slopes_of_parts", "slopes_of_bytes"}
PATCHED = OFTEN | CROSSED | {"edges", "maxima", "maxima_back", "hashes"}
PROGRAMS = {name: OFTEN for name in MODELS} | {"blt": PATCHED}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_plain_torch(name: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nats and slopes, in float32, norms among them; every kernel is asked."""
    model = MODELS[name]()
    model.init_weights(0)
    model = model.to(DEVICE)
    ids = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = ids[1, 30] = BOS
    ids[1, 60:] = PAD
    launched: list[str] = []

    def launch(program: SimpleNamespace, *arguments: object, **constants: object) -> None:
        launched.append(program.fn.__name__)
        started(program, *arguments, **constants)

    def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
        return whole(x, weight, eps, torch.float32)

    def step() -> Tensor:
        model.zero_grad()
        nats, _ = score(model, ids)
        nats.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([nats.detach()[None], *gradients]).cpu()

    started, whole = kernels.launch, kernels.rms_norm
    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "rms_norm", rms_norm)
    monkeypatch.setattr(fused, "norm_fits", lambda x: False)
    monkeypatch.setattr(fused, "rounds", lambda x: True)
    found = step()
    assert set(launched) == PROGRAMS[name]
    monkeypatch.setattr(fused, "kernels", lambda x: None)
    wanted = step().double()
    assert error(found[:1], wanted[:1]) < 1e-6 and error(found[1:], wanted[1:]) < 1e-5


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_ahead_nothing_spills(capability: int) -> None:
    """Of what programs hold in registers; few enough of these that a multiprocessor of 64 Ki runs three at once."""
    script = Path(__file__).parents[1] / "compile_ahead.py"
    run = subprocess.run(
        [sys.executable, script, str(capability)],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    assert {program for program, *_ in found} == PATCHED | {"sum_rows"}
    for program, constants, registers, spilled in found:
        assert spilled == 0 and registers * 32 * constants.get("num_warps", 4) <= 65536 // 3, (program, constants)


def test_where_triton_fails_torch_computes(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No C compiler, say: a warning, and no kernels."""

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setattr(kernels, "swiglu", fails)
    with pytest.warns(RuntimeWarning, match=r"using plain torch \(slower\): Failed to find C compiler"):
        assert fused.triton_kernels.__wrapped__() is None
    monkeypatch.setattr(kernels, "swiglu", lambda x: x)
    with warnings.catch_warnings():
        assert fused.triton_kernels.__wrapped__() is kernels
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert fused.triton_kernels.__wrapped__() is None
