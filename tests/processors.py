"""The kernels of training as this machine compiles them, and as ones without AVX-512, or without AVX2, do."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bytelm.native import library, training
from bytelm.nn import fused

OLDER = "x86-64-v3"  # AVX2, no products in bfloat16: what most machines have
OLDEST = "x86-64-v2"  # SSE4.2
PROCESSORS = ["native", OLDER, OLDEST] if platform.machine() == "x86_64" else ["native"]


def runs(processor: str) -> bool:
    """Whether this machine executes code for a processor."""
    return processor == "native" or processor in library.levels()


def compiled_for(processor: str) -> ctypes.CDLL | None:
    """The kernels of training for a processor; None without a compiler."""
    found = library.library("training")
    if processor == "native" or found is None:
        return found
    return ctypes.CDLL(str(library.compiled("training", library.compilers()[0], processor)))


@contextmanager
def used(processor: str) -> Iterator[None]:
    """Training with the kernels for a processor, although torch may be faster."""
    if not runs(processor):
        pytest.skip(f"this machine is no {processor}")
    found = compiled_for(processor)
    if found is None:
        pytest.skip(f"no kernels of training: {library.reason('training')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "library", lambda name: found)
        patch.setattr(fused, "multiplies_bfloat16", lambda: True)
        training.functions.cache_clear()
        yield
    training.functions.cache_clear()


@pytest.fixture(params=PROCESSORS)
def training_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels for each processor in turn."""
    with used(request.param):
        yield


@pytest.fixture
def own_training_kernels() -> Iterator[None]:
    """This machine's kernels."""
    with used("native"):
        yield
