"""Texts that tokens are learnt from."""

from __future__ import annotations

import numpy as np

from bytelm.data.bpe import Bpe


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


TEXT = b"The patches of a model are read as they are; tokens are what the reader of a text has made of them. " * 30
LITTLE = Bpe.learn([b"the cat and the dog and the hat, then another cat and another hat"], 300)
