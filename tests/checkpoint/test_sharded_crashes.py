"""Several processes save, and one of them is killed: the old checkpoint is there, or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardings_killed
import worlds


@pytest.mark.fault("T4")
def test_a_killed_process_of_a_save_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ((first, second),) = worlds.run(1, shardings_killed.at_every_call, tmp_path / "run", [3, 4], 13)
    assert first > 40 and second > 12


@pytest.mark.slow
@pytest.mark.fault("T4")
@pytest.mark.parametrize("there", [[5], [3, 4]])  # the only one is replaced, or the oldest goes
def test_kills_at_every_call_harm_nothing(tmp_path: Path, there: list[int]) -> None:
    (tmp_path / "run").mkdir()
    with worlds.started(1, shardings_killed.at_every_call, tmp_path / "run", there, 1) as processes:
        ((first, second),) = worlds.results(processes, patience=800)
    assert first > 40 and second > 12
