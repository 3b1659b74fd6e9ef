"""The commands and the code of every page in docs/ run as they stand, in order, for two steps instead of minutes.

In a page, a block that begins with the comment `# NAME` is that file, and a block of text right after a command is what
it prints. Lines of other programs than bytelm are left to the reader.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import sys
import warnings
import wave
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import published_hnet
from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe
from bytelm.cli import run as cli
from bytelm.config import build, to_mapping
from bytelm.errors import BytelmError
from bytelm.exchange.convert import export
from outside import install

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = ("sh", "python", "yaml", "toml", "text")
# What runs a page of its own.
ELSEWHERE = {"huggingface.md": "hf/test_tools.py", "serving-clients.md": "serve/test_clients.py"}

SMALL = ["model.local_dim=16", "model.local_heads=2", "model.cross_heads=2", "model.global_dim=32"]
SMALL += ["model.global_heads=2", "model.global_layers=1", "model.ngram_rows=64"]
BRIEF = ["train.batch=2", "train.context_length=64", "train.sample_bytes=4", "train.eval_bytes=256"]
TINY = {
    "model": {"name": "blt", "local_dim": 16, "local_heads": 2, "cross_heads": 2, "decoder_layers": 2}
    | {
        "global_dim": 32,
        "global_heads": 2,
        "global_layers": 2,
        "attention_window": 32,
        "ngram_rows": 101,
        "ffn_multiple": 16,
    },
    "patching": {"name": "entropy", "threshold": 5.4},
    "entropy_model": {
        "name": "transformer",
        "layers": 1,
        "dim": 16,
        "heads": 2,
        "attention_window": 16,
        "ffn_multiple": 16,
    },
}


def pages() -> list[str]:
    """Every page with something to run."""
    found = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    return sorted(page for page in found if page not in ELSEWHERE and (commands(page) or "```python\n" in read(page)))


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """The commands of bytelm in a page."""
    return [line for language, content, _ in blocks(page) if language == "sh" for line in ours(content)]


def blocks(page: str) -> list[tuple[str, str, bool]]:
    """(language, content, whether it stands right after the one before) of each block of a page, in order."""
    found = list(BLOCK.finditer(read(page)))
    ends = [0, *(match.end() for match in found)]
    return [(m[1], m[2], m.start() == end + 1) for m, end in zip(found, ends, strict=False) if m[1] in LANGUAGES]


def ours(content: str) -> list[str]:
    """The lines of a block of commands that are bytelm's, lines that go on put together."""
    lines = content.replace("\\\n", " ").splitlines()
    return [line.removeprefix(".venv/bin/") for line in lines if line.startswith(("bytelm ", ".venv/bin/bytelm "))]


def made(run: Path, bounded: bool = True) -> None:
    """A run of a small BLT that has learnt nothing."""
    bounds = {} if bounded else {"max_length": "none", "max_single_byte_run": "none"}
    recipe = build(Recipe, {**TINY, "patching": {**TINY["patching"], **bounds}}, "test")
    model = recipe.build()
    model.init_weights(0)
    model.patcher.entropy_model.model.init_weights(1)  # pyright: ignore[reportAttributeAccessIssue]
    run.mkdir(parents=True)
    store.save(run, 0, {"model": model.state_dict()}, {"recipe": to_mapping(recipe), "context": 64})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of."""
    (tmp_path / "notes").mkdir()
    for name in ("notes/monday.md", "notes/tuesday.md", "notes.txt", "diary.txt"):
        (tmp_path / name).write_text("".join(f"{name} has {n} bytes, or {n**3}?\n" for n in range(100)))
    (tmp_path / "books").mkdir()
    for name in ("one", "two", "three"):
        text = "".join(f"{number} {name}s, or {number**3}?\n" for number in range(3000))
        (tmp_path / "books" / f"{name}.txt").write_text(text)
    shutil.copytree(ROOT / "src" / "bytelm" / "patching", tmp_path / "src")
    shutil.copy(ROOT / "README.md", tmp_path)
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
    two = published_hnet.SHAPES["two stages"]
    published_hnet.published(tmp_path, two, published_hnet.tensors(two), "hnet_2stage_XL")
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


def shrunken(line: str) -> list[str]:
    """The words of a command, which does in a moment what is said to take minutes."""
    small = "" if re.search("--(init-from|preset|config)", line) else "".join(f" --set {setting}" for setting in SMALL)
    brief = "--steps 2 --quiet" + "".join(f" --set {setting}" for setting in BRIEF) + small
    line = re.sub("--(minutes|steps) [0-9]+", brief, line)
    line = re.sub("--amount [0-9]+", "--amount 1", line)
    if budgets := re.search("--budget ([0-9e]+(,[0-9e]+)*)", line):
        less = ",".join(["4e11", "8e11"][: len(budgets[1].split(","))])
        line = line.replace(" --dry-run", "").replace(budgets[0], f"--budget {less} --dry-run --quiet")
    return shlex.split(line, comments=True)


class Reader:
    """Somebody who does what a page says."""

    def __init__(self, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.here, self.monkeypatch, self.capfd = here, monkeypatch, capfd
        self.names: dict[str, object] = {}
        self.printed = ""
        self.planned: list[list[str]] = []

    def sh(self, content: str) -> None:
        for line in ours(content):
            words = shrunken(line)
            if "--dry-run" in words and words in self.planned:
                continue  # what is planned once and then done is planned once here
            self.planned.append(words)
            self.give_way(words)
            self.capfd.readouterr()
            code = cli(words[1:])
            self.printed, told = self.capfd.readouterr()
            assert code == 0, (line, told)

    def give_way(self, words: list[str]) -> None:
        """A run that was only made to be there goes where a page trains one of that name."""
        if words[1] == "train" and "--run" not in words:
            run = self.here / "runs" / words[2]
            if run.exists() and not (run / "config.toml").exists():
                shutil.rmtree(run)

    def python(self, content: str) -> None:
        content = re.sub(r"minutes=\d+", "steps=2", content.replace("sets=[", f"sets=[*{SMALL + BRIEF}, "))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of those that a page imports
            exec(content, self.names)

    def yaml(self, content: str) -> None:
        text = content.replace("lines.jsonl", str(self.here / "my-tasks" / "lines.jsonl"))
        (self.here / "my-tasks" / "lines.yaml").write_text(text)

    def file(self, name: str, content: str) -> None:
        """Put a file where it belongs: beside the files of bytelm that it is one of, or here."""
        floor = re.fullmatch(r"src/(bytelm/\w+)/(\w+)\.py", name)
        if floor is None:
            (self.here / name).parent.mkdir(exist_ok=True)
            (self.here / name).write_text(content)
            if name == "pyproject.toml":
                install(self.here, self.monkeypatch)
            return
        package = importlib.import_module(floor[1].replace("/", "."))
        folder = self.here / "clone" / floor[1]
        folder.mkdir(parents=True)
        (folder / f"{floor[2]}.py").write_text(content)
        self.monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        self.monkeypatch.setitem(sys.modules, f"{package.__name__}.{floor[2]}", None)  # so that it is forgotten again
        del sys.modules[f"{package.__name__}.{floor[2]}"]
        self.monkeypatch.setattr(package, floor[2], None, raising=False)
        delattr(package, floor[2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", pages())
def test_a_page_runs(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], page: str) -> None:
    reader = Reader(here, monkeypatch, capfd)
    for language, content, after in blocks(page):
        if name := re.match(r"# ([\w/.]+\.\w+)\n", content):
            reader.file(name[1], content)
        elif language == "text":
            assert not after or reader.printed.strip() == content.strip()
        elif language in ("sh", "python", "yaml"):
            getattr(reader, language)(content)


def test_every_page_is_run() -> None:
    """And the pattern that finds blocks finds them all."""
    for page in (path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")):
        fences = re.findall(r"^ *```(\w+)", read(page), re.MULTILINE)
        assert len(fences) == len(BLOCK.findall(read(page))), f"{page} has a block that is indented or not closed"
        assert not set(fences) & {"bash", "shell", "console", "py"}, f"{page} writes sh and python in another way"
    assert {"index.md", "quickstart.md", "weights.md", "extending.md"} <= set(pages())
    for page, test in ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / "tests" / test).read_text(), f"{test} does not run {page}"


# --- troubleshooting --------------------------------------------------------------------------------------------------


def errors(cls: type[BytelmError] = BytelmError) -> list[type[BytelmError]]:
    return [cls, *(below for direct in cls.__subclasses__() for below in errors(direct))]


def test_troubleshooting_has_a_part_for_every_code_with_its_exit_code() -> None:
    codes = {error.code: error.exit_code for error in errors() if error.__module__ == "bytelm.errors"}
    parts = dict(re.findall(r"^## (\w+)\n\nExit code (\d+):", read("troubleshooting.md"), re.MULTILINE))
    assert {code: int(number) for code, number in parts.items()} == codes


def test_troubleshooting_quotes_messages_that_there_are() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    quoted = re.findall(r"^- `([^`]+)`:", read("troubleshooting.md"), re.MULTILINE)
    assert len(quoted) > 40
    pieces = [piece.strip() for message in quoted for piece in message.split("…")]
    assert [piece for piece in pieces if not any(piece in source for source in sources)] == []


# --- links ------------------------------------------------------------------------------------------------------------


def test_pages_link_to_what_is_there() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert os.path.exists(page.parent / target), f"{page.name} links to {target}"  # noqa: PTH110


def test_a_table_ends_with_an_empty_line() -> None:
    """What stands directly below is shown as one more row: output of a program that was left there."""
    below = list[str]()
    for page in (*DOCS.rglob("*.md"), *ROOT.glob("*.md")):
        lines = BLOCK.sub("", page.read_text(encoding="utf-8")).split("\n")
        below += [f"{page.name}: {b[:60]}" for a, b in pairwise(lines) if a.startswith("|") and b and b[0] != "|"]
    assert below == []
