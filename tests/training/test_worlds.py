"""The processes that other tests start: all are heard, and one that fails or is lost is named."""

from __future__ import annotations

import os

import pytest

import worlds
from bytelm.training.dist import init_distributed


def total(factor: float) -> tuple[int, float]:
    with init_distributed(0.5) as dist:
        return dist.rank, dist.total(factor * (dist.rank + 1))[0]


def fails(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        raise ValueError("not today")


def ends(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        os._exit(3)


def test_each_process_gives_what_it_found() -> None:
    assert worlds.run(2, total, 10.0) == [(0, 30.0), (1, 30.0)]


def test_a_process_that_fails_or_ends_is_named() -> None:
    with pytest.raises(AssertionError, match=r"process 1:\n(.|\n)*not today"):
        worlds.run(2, fails, 1)
    with pytest.raises(AssertionError, match="process 0 ended with 3"):
        worlds.run(2, ends, 0)
