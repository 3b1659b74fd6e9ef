"""The README's commands and code run as they stand, on a small corpus and for two steps instead of ten minutes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from bytelm.cli import run as cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_commands_and_the_code_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "monday.md").write_text("# Monday\n" + "any bytes at all\n" * 300)
    (notes / "tuesday.md").write_text("".join(f"{number} bytes, or {number**3}?\n" for number in range(4000)))
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "photos").mkdir()
    for number in range(24):
        pixels = Image.effect_noise((40, 30), number).convert("RGB")
        pixels.save(tmp_path / ("cat.png" if number == 0 else f"photos/{number}.png"))
    monkeypatch.chdir(tmp_path)
    quick = "--steps 2 --quiet --set train.batch=2 --set train.context_length=64 --set train.sample_bytes=4"
    quick += " --set train.eval_bytes=256 --set entropy_model.rows=512"
    commands = [line.split("#  ")[0] for block in blocks("sh") for line in block.splitlines() if ".venv/bin/" in line]
    assert len(commands) == 13
    commands = [line for line in commands if " serve " not in line]  # which ends by a signal: tests/serve
    for command in commands:
        pictures = " ".join(word for word in quick.split() if "entropy_model" not in word).removesuffix("--set")
        line = command.replace("--minutes 10", pictures if "--as" in command else quick)
        line = line.replace("--budget 1e13", "--budget 4e11 --dry-run --quiet")
        line = line.replace("~/notes", str(notes)).replace("~/photos", str(tmp_path / "photos"))
        line = line.replace("image:32", "image:8")  # 3072 bytes each take their time
        words = shlex.split(line, comments=True)
        assert words[0] == ".venv/bin/bytelm"
        assert cli(words[1:]) == 0, capfd.readouterr().err
    with Image.open(tmp_path / "cat.completed.png") as completed:
        assert completed.size == (8, 8)
    (code,) = blocks("python")
    names: dict[str, object] = {"ids": torch.tensor([[257, 65]])}
    exec(code, names)
    assert isinstance(names["logits"], torch.Tensor) and names["logits"].shape == (1, 2, 260)


def test_what_make_runs_is_there() -> None:
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
