"""A published model of ours, and copies of it to be spoilt, in the layouts of both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bytelm.exchange.convert import export
from published import Pair, pair


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random model and its conversion."""
    return pair(tmp_path_factory.mktemp("one"))


@pytest.fixture
def folder(one: Pair, tmp_path: Path) -> Path:
    """A copy of the published folder, to be spoilt."""
    return Path(shutil.copytree(one.folder, tmp_path / "hf"))


@pytest.fixture(scope="module")
def hub(one: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the layout of Meta's hub."""
    home = tmp_path_factory.mktemp("meta") / "blt"
    export(one.run, "meta", home, {})
    return home


@pytest.fixture
def theirs(hub: Path, tmp_path: Path) -> Path:
    """A copy of Meta's folder, to be spoilt."""
    return Path(shutil.copytree(hub, tmp_path / "meta"))
