"""What the trainings of several files read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["the", "patch", "byte", "model", "of", "reads", "\x00", "déjà", "return", "x = 1\n"]
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(150)), encoding="utf-8")
    return folder
