"""Architectures of somebody else: packages outside this repository, found by their entry points once installed."""

from __future__ import annotations

import functools
import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from bytelm import find

PROJECT = """[project]
name = "somebody-elses"
version = "1.0"

[project.entry-points."bytelm.models"]
"""
FULL = {
    "model": """
from dataclasses import dataclass
from bytelm.models.transformer.model import ByteTransformer
from bytelm.models.transformer.model import Config as Base

@dataclass(frozen=True)
class Config(Base):
    layers: int = 1
    dim: int = 16
    heads: int = 2

    def build(self):
        return Full(self)

class Full(ByteTransformer):
    pass
""",
    "decoder": """
from bytelm.models.transformer.decoder import TransformerDecoder

class FullDecoder(TransformerDecoder):
    pass

build = FullDecoder
""",
    "costs": """
from bytelm.interfaces.costs import ArchitectureCosts

class Costs(ArchitectureCosts):
    def paper(self, context, mean):
        return 12345.0
""",
    "sizes": """
from bytelm.interfaces.sizes import Family, heads

def full(width, odd, number):
    return {"name": "full", "layers": 2 + odd, "dim": width, "heads": heads(width), "attention_window": number}

FAMILIES = {"full-window": Family(full, rate=8e-3, number=64)}
""",
    "entropy_model": """
from bytelm.models.transformer.entropy_model import Config
""",
    "formats/mine": """
from bytelm.config import build
from bytelm.checkpoint.assemble import Recipe
from bytelm.exchange.format import Reading
from safetensors.torch import load_file, save_file

def read(source, sets, stack):
    found = load_file(source / "mine.safetensors")
    recipe = build(Recipe, {"model": {"name": "full", **sets}}, str(source))
    return Reading(source.name, recipe, 64, [(name, "", name) for name in found], lambda: found)

def write(folder, recipe, context, ours):
    folder.mkdir()
    save_file(ours, folder / "mine.safetensors")

def compared(source, model, ids, ours):
    return ours, ours
""",
}


def write(folder: Path, package: str, files: dict[str, str]) -> None:
    """The files of a package, `__init__.py` left out: a folder of modules is one."""
    for name, text in files.items():
        (folder / package / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / package / f"{name}.py").write_text(text)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install -e` does of a project, without pip: its metadata, and the folder on every Python's path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    named = "".join(f"[{group}]\n{entries(names)}" for group, names in project["entry-points"].items())
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (info / "entry_points.txt").write_text(named)
    for name in ("architectures", "has"):  # what is found meanwhile is forgotten with what is installed
        monkeypatch.setattr(find, name, functools.cache(getattr(find, name).__wrapped__))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    forget()


def entries(names: dict[str, str]) -> str:
    return "".join(f"{name} = {value}\n" for name, value in names.items())


def forget() -> None:
    """Look again at what is installed."""
    for name in [name for name in sys.modules if name.startswith(("bytelm_gated", "bytelm_full"))]:
        del sys.modules[name]
    importlib.invalidate_caches()
    find.architectures.cache_clear()
    find.has.cache_clear()
