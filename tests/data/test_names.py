"""Names of the hub are told apart and split in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bytelm
from bytelm.data.names import PREFIX, after_prefix


@pytest.mark.parametrize(
    ("name", "rest"),
    [("hf:folder", "folder"), ("hf:owner/name", "owner/name"), ("hf:", ""), ("hf:hf:a", "hf:a"), ("./hf:a", None)],
)
def test_what_follows_the_prefix(name: str, rest: str | None) -> None:
    assert after_prefix(name) == rest


def test_the_prefix_is_written_in_one_module() -> None:
    root = Path(bytelm.__file__).parent
    written = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == PREFIX
    }
    assert written == {"data/names.py"}
