"""Cross-attention on a GPU against its definition in float64; interpreted where there is none, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from bytelm.nn import fused
from bytelm.nn.cross import BytesFromPatches, PatchesFromBytes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernels")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked wherever they can work, on a GPU or not; in float64 plain torch is."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for a GPU")
    from bytelm.nn import device_kernels

    monkeypatch.setattr(fused, "kernels", lambda x: device_kernels if x.dtype in fused.KINDS and x.numel() else None)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is not written is no number."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def agree(layer: torch.nn.Module, inputs: list[Tensor], index: Tensor, kind: torch.dtype) -> None:
    """Values and slopes of the layer's kernels and of its definition."""
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = layer.double()(*exact, index)
    slope = torch.randn(wanted.shape, dtype=torch.double)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, slope)]
    ours = [x.to(DEVICE, kind).requires_grad_() for x in inputs]
    layer = layer.to(DEVICE, kind)
    with poisoned():
        found = layer(*ours, index.to(DEVICE))
        found = [found, *torch.autograd.grad(found, ours, slope.to(found))]
    for one, other in zip(found, wanted, strict=True):
        error = float((one.detach().cpu().double() - other.detach()).norm() / other.detach().norm().clamp(min=1e-6))
        assert error < (1e-5 if kind == torch.float32 else 2**-6)


SHAPES = [(1, 2, 8, 2), (1, 1, 24, 3), (4, 2, 16, 1), (3, 3, 64, 2)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("parts", "heads", "head_dim", "rows"), SHAPES)
def test_patches_attend_their_bytes(parts: int, heads: int, head_dim: int, rows: int, kind: torch.dtype) -> None:
    """Patches of 0, 1 and many bytes; bytes of none at the start, in between and at the end."""
    torch.manual_seed(0)
    sizes = torch.tensor([1, 0, 3, 8, 9, 30, 2])
    none = len(sizes)
    line = torch.repeat_interleave(torch.arange(none), sizes)
    segment = torch.cat([torch.tensor([none]), line[:4], torch.tensor([none] * 3), line[4:], torch.tensor([none] * 5)])
    dim = heads * head_dim
    inputs = [3 * torch.randn(none, parts, dim), 3 * torch.randn(len(segment), dim)]
    agree(PatchesFromBytes(dim, heads), inputs, segment, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("parts", "heads", "head_dim", "rows"), SHAPES)
def test_bytes_attend_their_patch(parts: int, heads: int, head_dim: int, rows: int, kind: torch.dtype) -> None:
    """Patches that no byte, one and many bytes read."""
    torch.manual_seed(0)
    index = (torch.rand(rows, 37) < 0.3).cumsum(1) * torch.tensor([2, 1, 0])[:rows, None]
    dim = heads * head_dim
    inputs = [3 * torch.randn(rows, 37, dim), 3 * torch.randn(rows, int(index.max()) + 2, parts, dim)]
    agree(BytesFromPatches(dim, heads), inputs, index, kind)
