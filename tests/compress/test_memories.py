"""The memory that a compressed file needs is in its header: how large, and with which predictors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bytelm.cli import run as cli
from bytelm.compress.header import opened, sealed, unsealed
from bytelm.compress.stream import compress
from bytelm.data.corpora import open_corpus
from bytelm.errors import DataError
from bytelm.lm import load
from bytelm.online import kinds, saved
from bytelm.online.kinds import image
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.testing import UniformModel


def test_a_memory_suits_the_file_and_the_header_says_how(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`compress` and `eval` look at the file, not at what the run was trained on; `decompress` is told."""
    y, x = np.mgrid[0:50, 0:60]
    grain = np.random.default_rng(0).normal(0, 1, x.shape)
    file, packed = tmp_path / "picture.raw", tmp_path / "picture.blm"
    file.write_bytes((120 + 60 * np.sin(x / 9) + 40 * np.cos(y / 7) + grain).astype(np.uint8).tobytes())
    assert cli(["compress", str(run), str(file), "--online", "cold", "--out", str(packed), "--quiet"]) == 0
    header, _ = opened(load(run).model, packed.read_bytes())
    assert header.settings == Settings(image(1, 60))
    assert cli(["decompress", str(run), str(packed), "--out", str(tmp_path / "restored"), "--quiet"]) == 0
    assert (tmp_path / "restored").read_bytes() == file.read_bytes()
    capfd.readouterr()
    assert cli(["eval", str(run), str(file), "--online", "cold", "--json"]) == 0
    bits = json.loads(capfd.readouterr().out)["online"]["bits"]
    assert bits / 8 == pytest.approx(packed.stat().st_size - 200, abs=200), "what eval measures, compress writes"


def test_predictors_that_nobody_knows_are_a_damaged_header() -> None:
    model = UniformModel()
    packed = compress(model, b"some bytes", 64, memory=Memory(Settings(("order:0", "order:1"), 1 << 20)))
    assert b"order:1" in packed
    for name in (b"order-1", b"ordet:1", b"order:\xff", b"order:0"):
        with pytest.raises(DataError, match="its header is damaged"):
            opened(model, sealed(unsealed(packed).replace(b"order:1", name, 1)))


def test_a_memory_has_room_for_what_it_learns(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a file what a stream reads of it, for a run its training split."""
    asked = list[int]()

    def counted(count: int) -> int:
        asked.append(count)
        return 4 << 20

    monkeypatch.setattr(kinds, "memory_for", counted)
    file, packed = tmp_path / "file", tmp_path / "file.blm"
    file.write_bytes(b"some text, and more of it. " * 20)
    words = ["compress", str(run), str(file), "--out", str(packed), "--quiet", "--online", "cold", "--streams", "2"]
    assert cli(words) == 0 and cli(["prime", str(run), "--quiet"]) == 0
    assert asked == [270, open_corpus(run / "data").bytes("train")]
    header, _ = opened(load(run).model, packed.read_bytes())
    assert header.settings == saved.opened(run, "primed").settings == Settings(memory=4 << 20)
