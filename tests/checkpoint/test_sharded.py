"""Checkpoints of several processes: saved by any number, loaded by any other, and by one process alone."""

from __future__ import annotations

from pathlib import Path

import torch

import shardings
import worlds
from bytelm.checkpoint import store


def test_saved_by_any_number_of_processes_and_loaded_by_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    store.save(tmp_path / "plain", 7, shardings.whole(7), {"world": 0})
    right = worlds.run(4, shardings.by_any_number, tmp_path, [1, 2, 3, 4])
    assert right == [30, 24, 18, 12]  # 6 checkpoints, by as many meshes as the process is of
    for path in tmp_path.glob("by */checkpoints/step-00000007"):
        store.verify(path)
        assert store.newest(path.parent.parent) == path
        assert store.read_state(path)["step"] == 7
        for group, wanted in shardings.whole(7).items():
            found = store.read_tensors(path, group)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
