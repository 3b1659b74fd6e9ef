"""The invariants of decoders with kernels as compiled for narrower processors, whatever this machine is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bytelm.decoding import open_decoder
from bytelm.native import kernels, library
from bytelm.testing.decoders import DECODER_INVARIANTS
from bytelm.testing.tiny import tiny_models
from processors import OLDER, OLDEST, PROCESSORS, runs

MODELS = dict(tiny_models())
NARROWER = [processor for processor in (OLDER, OLDEST) if processor in PROCESSORS]
CASES = [(name, invariant) for name in MODELS for invariant in DECODER_INVARIANTS if invariant != "again"]

pytestmark = pytest.mark.skipif(not library.compilers(), reason="no C++ compiler")


@pytest.fixture(params=NARROWER)
def narrower(request: pytest.FixtureRequest) -> Iterator[str]:
    """Decoders with the kernels for a processor."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, request.param)
        yield request.param


def use(patch: pytest.MonkeyPatch, processor: str) -> None:
    if not runs(processor):
        pytest.skip(f"this machine is no {processor}")
    found = ctypes.CDLL(str(library.compiled("kernels", library.compilers()[0], processor)))
    patch.setattr(kernels, "library", lambda name: found)


@pytest.mark.parametrize(("name", "invariant"), CASES, ids=[f"{name} · {invariant}" for name, invariant in CASES])
def test_invariants(name: str, invariant: str, narrower: str) -> None:
    DECODER_INVARIANTS[invariant](MODELS[name], list(MODELS).index(name), 1)


@pytest.mark.skipif(OLDER not in NARROWER, reason="of processors with AVX2 and AVX-512")
def test_processors_that_fuse_multiplications_and_additions_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.levels()[-1:] < ("x86-64-v4",):
        pytest.skip("this machine has no AVX-512")
    ids = np.random.default_rng(0).integers(0, 256, 200)
    for name, model in MODELS.items():
        found: list[np.ndarray] = []
        for processor in ("native", OLDER):
            with monkeypatch.context() as patch:
                use(patch, processor)
                with torch.no_grad():
                    decoder = open_decoder(model, rows=1, capacity=len(ids), quantize="bf16")
                    found.append(decoder.read(np.zeros(len(ids), np.int64), ids))
        assert np.array_equal(*found), name
