"""The pool of threads of decoders' kernels: after a fork, and when several threads of a program call at once."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from bytelm.decoding.host import Host
from bytelm.native import library
from bytelm.native.kernels import ThreadPool

pytestmark = pytest.mark.skipif(library.library("kernels") is None, reason="no kernels")


def product(threads: int) -> np.ndarray:
    """A product that is large enough for several threads."""
    rng = np.random.default_rng(0)
    kernels = Host.open(thread_pool=ThreadPool(threads, threads))
    weight = torch.from_numpy(rng.standard_normal((512, 256)).astype(np.float32))
    x = rng.standard_normal((40, 256)).astype(np.float32)
    return kernels.linear(kernels.matrix(weight), x)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    assert np.array_equal(product(threads), product(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_threads_of_its_own() -> None:
    alone = product(2)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(product(2), alone) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_calls_at_once_wait_for_nobody() -> None:
    alone, found = product(1), list[np.ndarray]()
    callers = [threading.Thread(target=lambda: found.extend(product(3) for _ in range(20))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(found) == 80 and all(np.array_equal(one, alone) for one in found)
