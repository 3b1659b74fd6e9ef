"""The commands and the code of the pages in docs/ run as they stand, in order, for two steps instead of minutes."""

from __future__ import annotations

import json
import os
import re
import shlex
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe
from bytelm.cli import run as cli
from bytelm.config import build, to_mapping
from bytelm.exchange.convert import export

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [("weights.md", 9), ("finetuning.md", 5), ("evaluating.md", 5), ("data.md", 10)]  # and their commands
QUICK = "--steps 2 --quiet --set train.batch=2 --set train.window=64 --set train.sample_bytes=4"
TINY = {
    "model": {"name": "blt", "local_dim": 16, "local_heads": 2, "cross_heads": 2, "decoder_layers": 2}
    | {"global_dim": 32, "global_heads": 2, "global_layers": 2, "window": 32, "ngram_rows": 101, "ffn_multiple": 16},
    "patching": {"name": "entropy", "threshold": 5.4},
    "scorer": {"name": "transformer", "layers": 1, "dim": 16, "heads": 2, "window": 16, "ffn_multiple": 16},
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of each block of a page, in order."""
    return re.findall(r"```(sh|python|yaml)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def made(run: Path, bounded: bool = True) -> None:
    """A run of a small BLT that has learnt nothing."""
    bounds = {} if bounded else {"max_length": "none", "max_singles": "none"}
    recipe = build(Recipe, {**TINY, "patching": {**TINY["patching"], **bounds}}, "test")
    model = recipe.assemble()
    model.initialise(0)
    model.patcher.scorer.model.initialise(1)  # pyright: ignore[reportAttributeAccessIssue]
    run.mkdir(parents=True)
    store.save(run, 0, {"model": model.state_dict()}, {"recipe": to_mapping(recipe), "context": 64})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of."""
    (tmp_path / "notes").mkdir()
    for name in ("notes/monday.md", "notes/tuesday.md", "notes.txt", "diary.txt"):
        (tmp_path / name).write_text("".join(f"{name} has {n} bytes, or {n**3}?\n" for n in range(300)))
    for run in ("notes", "base", "mine"):
        made(tmp_path / "runs" / run)
    made(tmp_path / "published", bounded=False)
    for folder, layout in (("blt-1b-hf", "hf"), ("blt-1b", "meta")):
        export(tmp_path / "published", layout, tmp_path / folder, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from MEGABYTE_pytorch import MEGABYTE

        shape: dict[str, Any] = {"dim": (64, 32), "depth": (1, 1), "max_seq_len": (64, 4), "heads": 8, "dim_head": 4}
        torch.save(MEGABYTE(num_tokens=256, **shape).state_dict(), tmp_path / "megabyte.pt")
    (tmp_path / "my-tasks").mkdir()
    lines = [json.dumps({"text": f"line {n} of a text"}) for n in range(6)]
    (tmp_path / "my-tasks" / "lines.jsonl").write_text("\n".join(lines))
    own_data(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_data(folder: Path) -> None:
    """What docs/data.md reads."""
    (folder / "stories.jsonl").write_text("".join(json.dumps({"body": f"story {n}, told"}) + "\n" for n in range(40)))
    pq.write_table(pa.table({"body": [f"row {n}" for n in range(40)]}), folder / "table.parquet")
    for name in ("dataset", "photos", "clips"):
        (folder / name).mkdir()
    (folder / "dataset/validation.jsonl").write_text(
        "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(9))
    )
    draw = np.random.default_rng(0)
    for n in range(12):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "photos" / f"{n}.png")
        with wave.open(str(folder / "clips" / f"{n}.wav"), "wb") as clip:
            clip.setparams((1, 2, 8000, 0, "NONE", ""))
            clip.writeframes(draw.bytes(800))
    (folder / "genes.fasta").write_text("".join(f">{n}\n{'ACGT' * 40}{'ACG' * n}\n" for n in range(12)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("page", "commands"), PAGES)
def test_a_page_runs(here: Path, capfd: pytest.CaptureFixture[str], page: str, commands: int) -> None:
    names: dict[str, object] = {}
    ran = 0
    for language, content in blocks(page):
        if language == "yaml":
            text = content.replace("lines.jsonl", str(here / "my-tasks" / "lines.jsonl"))
            (here / "my-tasks" / "lines.yaml").write_text(text)
        elif language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of those that a page imports
                exec(content, names)
        else:
            for line in content.splitlines():
                words = shlex.split(re.sub("--(minutes|steps) [0-9]+", QUICK, line), comments=True)
                assert words[0] == "bytelm"
                assert cli(words[1:]) == 0, (line, capfd.readouterr().err)
                ran += 1
    assert ran == commands


def test_pages_link_to_what_is_there() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert os.path.exists(page.parent / target), f"{page.name} links to {target}"  # noqa: PTH110
