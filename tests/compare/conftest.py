"""The data of comparisons."""

from __future__ import annotations

import pytest

from comparisons import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "texts.jsonl", 76_000)
