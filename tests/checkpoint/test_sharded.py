"""Checkpoints of several processes: saved by any number, loaded by any other, and by one process alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import shardings
import worlds
from bytelm.checkpoint import store
from checkpoints import names


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


@pytest.mark.slow
def test_eight_processes(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    store.save(tmp_path / "plain", 7, shardings.whole(7), {"world": 0})
    assert worlds.run(8, shardings.by_any_number, tmp_path, [1, 3, 8]) == [12] + [8] * 2 + [4] * 5


def test_old_ones_go_a_newer_one_stays_and_one_is_replaced(tmp_path: Path) -> None:
    assert (
        worlds.run(2, shardings.steps, tmp_path, [1, 2, 5, 4, 4]) == [[f"step-0000000{n}" for n in (1, 2, 5, 4, 4)]] * 2
    )
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000004", "step-00000005"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004\n"


FAULTS = [(0, "fsync", n) for n in range(8)] + [(1, "fsync", n) for n in range(4)] + [(0, "rename", 0)]


@pytest.mark.fault("T9")
def test_a_disk_that_refuses_in_one_process_is_an_error_in_all(tmp_path: Path) -> None:
    first, second = worlds.run(2, shardings.refused, tmp_path, FAULTS)
    assert first == second
    for (process, _, _), said in zip(FAULTS, first, strict=True):
        assert re.search(
            rf"cannot save step 2 to .*step-00000002: process {process}: No space left on device; it needs \d+ B: make",
            said,
        )


@pytest.mark.parametrize("times", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_a_save_in_the_background_beside_other_collectives(tmp_path: Path, times: int) -> None:
    """Again and again: on one group they would mix, and end the processes."""
    assert worlds.run(2, shardings.in_the_background, tmp_path, times) == [(6.0 * times, True)] * 2


@pytest.mark.fault("T9")
def test_what_went_wrong_in_the_background_is_told_to_all(tmp_path: Path) -> None:
    for found in worlds.run(2, shardings.wrong_in_the_background, tmp_path):
        disk, state, memory, nothing = found
        assert disk.startswith("ResourceError: cannot save step 1") and "process 1: No space left" in disk
        assert state.startswith("ValueError: Out of range float values are not JSON compliant")
        assert memory.startswith("ResourceError: cannot save") and "process 1: no memory" in memory
        assert nothing == "nothing"
    assert names(tmp_path) == ["latest", "step-00000005"]
