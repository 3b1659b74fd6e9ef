"""Bytes and log-probabilities for the tests of the memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def logs(count: int, seed: int = 0) -> NDArray[np.float32]:
    """What a network might say, certain and uncertain, and with what is no number or impossible."""
    random = np.random.default_rng(seed)
    made = random.normal(0, random.choice([0.1, 2, 9], (count, 1)), (count, 256))
    made -= np.log(np.exp(made).sum(1, keepdims=True))
    made[:, 3], made[:, 5], made[:, 7] = -np.inf, np.nan, 1.0
    return made.astype(np.float32)


def inputs() -> dict[str, NDArray[np.uint8]]:
    random = np.random.default_rng(1)
    text = b"The memory reads, and\n    what it has read it knows_2 again; thE m\xc3\xa9mory\n\treads. " * 4
    return {
        "text": np.frombuffer(text, np.uint8)[:300],
        "random": random.integers(0, 256, 150, np.uint8),
        "repeated": np.tile(random.integers(0, 256, 11, np.uint8), 20),
        "zeros": np.zeros(120, np.uint8),
    }
