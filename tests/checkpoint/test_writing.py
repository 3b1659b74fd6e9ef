"""Files written block by block: the bytes, whatever the pieces, with and without the page cache; disks that refuse."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from bytelm.checkpoint import writing


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BLOCK", 4096)


@pytest.fixture(params=["direct", "cached", "refused late"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Past the page cache, where the disk can; not; or opened so, and then refused."""
    if request.param == "cached":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if request.param == "refused late" and hasattr(os, "pwrite"):

        def refuse(*_: Any) -> int:
            raise OSError(errno.EINVAL, "no")

        monkeypatch.setattr(os, "pwrite", refuse)
    return request.param


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 40_000])
def test_what_is_written_is_what_was_given(tmp_path: Path, how: str, size: int) -> None:
    rng, data = random.Random(size), random.Random(1).randbytes(size)
    pieces: list[tuple[str, bytes]] = []
    while sum(len(piece) for _, piece in pieces) < size:
        at = sum(len(piece) for _, piece in pieces)
        pieces.append((rng.choice(("", "a", "b")), data[at : at + rng.choice((1, 7, 4096, 9000))]))
    entry = writing.write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == data and entry.size == size
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    own = {name: hashlib.sha256(b"".join(p for n, p in pieces if n == name)) for name in {n for n, _ in pieces if n}}
    assert entry.tensors == {name: digest.hexdigest() for name, digest in own.items()}


def test_a_disk_that_is_full(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is raised, although it is written by another thread."""

    def put(self: writing.Blocks, block: Any, start: int, count: int) -> None:
        if start >= 8192:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.Blocks, "put", put)
    with pytest.raises(OSError, match="No space left"):
        writing.write(tmp_path / "file", [("a", bytes(5000))] * 5)


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        writing.write(tmp_path / "file", [("", b"y")])
