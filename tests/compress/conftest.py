"""A run whose files are compressed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bytelm.cli import run as cli
from small import BLT, TRAINED


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on `notes.txt` beside it."""
    folder = tmp_path_factory.mktemp("compress")
    rng = random.Random(0)  # lines of one length would be records
    lines = (f"line {number} of some {'very ' * rng.randrange(4)}short notes\n" for number in range(900))
    (folder / "notes.txt").write_text("".join(lines))
    small = [s for s in BLT if "entropy_model" not in s] + TRAINED + ["entropy_model.rows=512"]
    sets = [word for setting in small for word in ("--set", setting)]
    words = ["train", str(folder / "notes.txt"), "--run", str(folder / "run"), "--steps", "3", "--quiet", *sets]
    assert cli(words) == 0
    return folder / "run"
