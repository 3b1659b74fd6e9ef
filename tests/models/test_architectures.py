"""A folder per architecture: what its files are found for, somebody else's package, and engines that know none."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bytelm
from bytelm import find
from bytelm.checkpoint.assemble import Recipe, load
from bytelm.cli import run as cli
from bytelm.compare.candidates import DEFAULT, candidates
from bytelm.config import build, to_mapping
from bytelm.decoding import open_decoder, why_plain
from bytelm.errors import ConfigError, UsageError
from bytelm.evaluate.costs import costs
from bytelm.exchange.format import Format, find_layout
from bytelm.interfaces.costs import ArchitectureCosts
from bytelm.interfaces.decoder import Decoder
from bytelm.interfaces.sizes import Family
from outside import FULL, PROJECT, forget, install, write

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "bytelm"
ENGINES = ("checkpoint", "cli", "compare", "compress", "decoding", "evaluate", "exchange", "generate", "harness", "hf")
ENGINES += ("interfaces", "lm", "report", "train")
PARTS = {"model", "decoder", "costs", "sizes", "entropy_model", "entropy_decoder", "formats"}
# Where an engine looks an attribute up by its name: of the standard library, of errors, of dataclasses of its own.
LOOKED_UP = {"signal", "sys", "error", "self", "p", "changed", "config.train"}
# The figures of the papers are of certain architectures; a figure is data.
FIGURES = "compare/figures.py"
# Objects of transformers have what their kind has.
FOREIGN = ("hf/encoding.py", "hf/foreign.py", "hf/proof.py")


def engines() -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node of the packages that know no architecture."""
    for path in sorted(SOURCES.rglob("*.py")):
        name = path.relative_to(SOURCES).as_posix()
        if name.split("/")[0].removesuffix(".py") in ENGINES:
            yield from ((name, node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def asks(node: ast.AST) -> bool:
    """Whether a node tells architectures apart: by an attribute that one may have, by a class's name, or by its own."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
        return ast.unparse(node.args[0]) not in LOOKED_UP
    if isinstance(node, ast.MatchClass):
        return ast.unparse(node.cls) not in ("bool", "int", "float", "str", "list", "tuple")
    if isinstance(node, ast.Compare):
        return re.search(r"\.__(name|module|class|qualname)__", ast.unparse(node)) is not None
    return isinstance(node, ast.Constant) and node.value in find.names("models")


def test_engines_know_no_architecture() -> None:
    """Imports of architectures, and so isinstance of them, are what the import contract forbids."""
    found = [f"{file}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}" for file, node in engines() if asks(node)]
    told = [line for line in found if not (line.startswith("compare/results.py") and line.endswith("'hnet'"))]
    assert [line for line in told if not line.startswith((FIGURES, *FOREIGN))] == []  # 'hnet': a way to count FLOPs


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('hasattr(model, "patcher")', True),
        ('getattr(model, "patch", None)', True),
        ('type(model).__name__ == "BLT"', True),
        ('recipe["model"]["name"] == "blt"', True),
        ("match model:\n    case BLT(): pass", True),
        ("model.patcher is not None", False),
    ],
)
def test_that_it_is_seen(line: str, wrong: bool) -> None:
    assert any(asks(node) for node in ast.walk(ast.parse(line))) is wrong


@pytest.mark.parametrize("name", sorted(find.architectures()))
def test_every_file_of_an_architecture_is_what_its_name_says(name: str) -> None:
    folder = SOURCES / "models" / name
    assert {path.stem for path in folder.iterdir()} & PARTS
    if decoder := find.part(name, "decoder"):
        assert issubclass(decoder.build, Decoder)
    if counted := find.part(name, "costs"):
        assert issubclass(counted.Costs, ArchitectureCosts)
    if sizes := find.part(name, "sizes"):
        assert all(isinstance(family, Family) for family in sizes.FAMILIES.values())
    if entropy_model := find.part(name, "entropy_model"):
        assert find.name_of(entropy_model.Config()) == name and find.part(name, "entropy_decoder") is not None


def test_layouts_and_candidates_are_found() -> None:
    assert list(find.formats()) == ["hf", "hnet", "megabyte", "meta"]
    assert all(isinstance(find_layout(name), Format) for name in find.formats())
    with pytest.raises(UsageError, match="unknown layout 'mata': did you mean 'meta'"):
        find_layout("mata")
    assert len(candidates(DEFAULT)) == 12


def test_a_component_is_called_what_its_folder_is_called() -> None:
    for kind in {*find.PARTS, *find.SHARED} - {"evaluate.robustness", "online.predictors"}:  # which have no Config
        for name in find.names(kind):
            assert find.name_of(find.find(kind, name).Config()) == name, (kind, name)


# --- somebody else's --------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two projects in one: `gated` has a model alone, `full` every file that an architecture may have."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (gated,) = re.findall(r"```python\n# bytelm_gated/model\.py\n(.*?)```", page, re.DOTALL)
    write(tmp_path, "bytelm_gated", {"model": gated.replace("dim: int = 128", "dim: int = 8")})
    write(tmp_path, "bytelm_full", FULL)
    (tmp_path / "pyproject.toml").write_text(PROJECT + 'gated = "bytelm_gated"\nfull = "bytelm_full"\n')
    (tmp_path / "notes").mkdir()
    for index in range(40):
        (tmp_path / "notes" / f"{index}.txt").write_text(f"note {index}: " + "what was seen today. " * 120)
    install(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(name: str, **sizes: Any) -> Path:
    sets = [f"model.{key}={value}" for key, value in {"name": name, **sizes}.items()]
    sets += ["train.context_length=64", "train.batch=2", "train.sample_bytes=0"]
    words = ["train", "notes", "--preset", "byte-tiny", "--run", f"runs/{name}", "--steps", "2", "--quiet"]
    assert cli([*words, *(f"--set={one}" for one in sets)]) == 0
    return Path("runs") / name


def test_one_with_a_model_alone_trains_generates_is_compared_and_saved(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained("gated")
    assert why_plain(load(run).model) == "the kernels do not know Gated"
    assert cli(["generate", str(run), "note", "--max-bytes", "8"]) == 0
    assert cli(["eval", str(run), "notes/1.txt"]) == 0
    lm = bytelm.load(run)
    lm.save_pretrained(here / "saved")
    assert bytelm.load(here / "saved").generate(b"note", max_bytes=8) == lm.generate(b"note", max_bytes=8)
    recipe = build(Recipe, {"model": {"name": "gated"}}, "")
    found = costs(recipe, 64)
    assert found.paper == found.executed > 0 and to_mapping(recipe)["model"] == {"name": "gated", "dim": 8}
    words = ["compare", "notes", "--models", "gated", "--budget", "1e9", "--seeds", "1", "--run", "runs/compared"]
    capfd.readouterr()
    assert cli([*words, "--online", "--quiet", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    (result,), (beside,) = found["models"], found["online"]["models"]
    assert result["model"] == beside["model"] == "gated"
    assert beside["online"] < beside["bits_per_byte"] == pytest.approx(result["bits_per_byte"]) and beside["online"] < 8


def test_one_with_every_file_has_every_ability(here: Path) -> None:
    run = trained("full", layers=1, dim=16, heads=2)
    model = load(run).model
    assert type(open_decoder(model, rows=1, capacity=9)).__name__ == "FullDecoder" or why_plain(model)
    assert costs(build(Recipe, {"model": {"name": "full"}}, ""), 64).paper == 12345
    (one,) = candidates("full-window:32")
    assert one.tables(64, 0)["model"]["attention_window"] == 32
    assert cli(["export", str(run), "theirs", "--to", "mine"]) == 0
    assert cli(["convert", "theirs", "runs/back", "--format", "mine", "--check"]) == 0
    back = load("runs/back").model.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    patched = {"model": {"name": "blt"}, "patching": {"name": "entropy"}, "entropy_model": {"name": "full"}}
    assert build(Recipe, patched, "").uses_entropy_model


def test_a_name_whose_package_is_gone_is_unknown(here: Path) -> None:
    (here / "bytelm_gated" / "model.py").unlink()
    forget()
    assert "gated" not in find.names("models")
    with pytest.raises(ConfigError, match="unknown model 'gated'"):
        build(Recipe, {"model": {"name": "gated"}}, "")


def test_a_package_that_is_broken_stops_nobody_else(here: Path) -> None:
    (here / "bytelm_gated" / "__init__.py").write_text("raise OSError('its library is missing')")
    forget()
    with pytest.warns(
        UserWarning, match="ignoring bytelm_gated: it cannot be imported .OSError: its library is missing"
    ):
        assert {"blt", "full"} <= set(find.names("models")) and "gated" not in find.names("models")


def test_one_of_the_name_of_ours_does_not_replace_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = here / "somebody_elses-1.0.dist-info" / "entry_points.txt"
    entry.write_text("[bytelm.models]\nblt = bytelm_full\n")
    forget()
    assert find.architectures()["blt"] == "bytelm.models.blt"
