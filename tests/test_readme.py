"""The README's commands and code run as they stand, on a small corpus and for two steps instead of ten minutes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from bytelm.cli import run as cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_commands_and_the_code_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "monday.md").write_text("# Monday\n" + "any bytes at all\n" * 300)
    (tmp_path / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    quick = (
        "--steps 2 --quiet --set train.batch=2 --set train.window=64 --set train.sample_bytes=4 --set scorer.rows=512"
    )
    commands = [line.split("#  ")[0] for block in blocks("sh") for line in block.splitlines() if ".venv/bin/" in line]
    assert len(commands) == 5
    for command in commands:
        line = command.replace("--minutes 10", quick).replace("~/notes", str(notes))
        words = shlex.split(line, comments=True)
        assert words[0] == ".venv/bin/bytelm"
        assert cli(words[1:]) == 0, capfd.readouterr().err
    (code,) = blocks("python")
    names: dict[str, object] = {"ids": torch.tensor([[257, 65]])}
    exec(code, names)
    assert isinstance(names["logits"], torch.Tensor) and names["logits"].shape == (1, 2, 260)


def test_what_make_runs_is_there() -> None:
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
