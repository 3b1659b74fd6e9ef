"""A file that is written by position: of one process, ours alone, and whole under its own name."""

from __future__ import annotations

import resource
from contextlib import closing
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from bytelm.data import files
from bytelm.data.files import PositionWriter
from bytelm.errors import ResourceError, UsageError


def test_a_file_of_somebody_elses_is_not_written_to(tmp_path: Path) -> None:
    """One that is empty or was left is taken, of another size too."""
    path = tmp_path / "x.partial"
    for text in (b"notes", b"longer notes than a mark has bytes"):
        path.write_bytes(text)
        with pytest.raises(UsageError, match=r"x\.partial exists and is not of an interrupted command: move"):
            PositionWriter(path, 3)
        assert path.read_bytes() == text
    path.write_bytes(b"")
    for size in (50, 40, 70):
        with closing(PositionWriter(path, size)) as target:
            assert target.empty == (size == 50)
            target.write(3, np.ones(9, np.uint8))
    with closing(PositionWriter(path, 70)) as target:
        target.move(tmp_path / "x")
    assert (tmp_path / "x").read_bytes()[:14] == bytes(3) + b"\1" * 9 + bytes(2)
    assert (tmp_path / "x").stat().st_size == 70


def test_a_partial_file_that_was_moved_before_it_is_locked_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, times = files._locked, 0  # pyright: ignore[reportPrivateUsage]

    def late(file: FileIO) -> bool:
        nonlocal times
        times += 1
        if times == 1:
            (tmp_path / "x.partial").rename(tmp_path / "x")
        return lock(file)

    monkeypatch.setattr(files, "_locked", late)
    with closing(PositionWriter(tmp_path / "x.partial", 3)) as target:
        target.write(0, np.ones(3, np.uint8))
        target.move(tmp_path / "y")
        (tmp_path / "x.partial").write_bytes(b"the next one's")
        target.delete()
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == [
        ("x", b""),
        ("x.partial", b"the next one's"),
        ("y", b"\1\1\1"),
    ]


def test_a_disk_that_takes_a_part_is_an_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(PositionWriter(tmp_path / "file", 900)) as target:
        target.write(0, np.zeros(9, np.uint8))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(ResourceError, match=r"cannot write .*file \(.*\): name another place"):
                target.write(90, np.ones(20, np.uint8))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"another's")
    (tmp_path / "x.partial").symlink_to(tmp_path / "other")
    with pytest.raises(ResourceError, match=r"cannot write .*x\.partial \("):
        PositionWriter(tmp_path / "x.partial", 3)
    assert (tmp_path / "other").read_bytes() == b"another's"
