"""Name → module, imported when used: `find("patching", "space")` imports one file only. There is no registry.

A patching scheme and a modality are one file in their folder. An architecture is one folder, `bytelm/models/NAME`, or
an installed package under the entry point group `bytelm.models`; its parts are found by file name.

    models/NAME/model.py          Config and the ByteModel that it builds                                    required
                decoder.py        generation with cached state              else: by the forward pass
                costs.py          FLOPs by its paper, bytes read per byte   else: counted from the model
                sizes.py          candidates of `compare`, in every size    else: one size, that of its Config
                entropy_model.py  what entropy patching calls               else: it is none
                formats/NAME.py   published weights, in and out             else: none
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import warnings
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from bytelm.errors import ConfigError

GROUP = "bytelm.models"  # of entry points: NAME = a package whose files are as above
# Modules in a kind's folder that are not of that kind.
SHARED: dict[str, set[str]] = {
    "data.modalities": {"base"},
    "patching": {"base", "layout"},
    "evaluate.robustness": {"base"},
    "online.predictors": set(),
}
# Kinds that are one part of an architecture.
PARTS = {"models": "model", "entropy_models": "entropy_model"}
TITLES = {
    "models": "model",
    "entropy_models": "entropy model",
    "patching": "patching scheme",
    "data.modalities": "modality",
    "evaluate.robustness": "robustness suite",
    "online.predictors": "predictor",
}


def names(kind: str) -> list[str]:
    """The names that `find(kind, name)` accepts, sorted; their modules are not imported."""
    if kind in PARTS:
        return [name for name, package in sorted(architectures().items()) if has(package, PARTS[kind])]
    package = importlib.import_module(f"bytelm.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in SHARED[kind])


def find(kind: str, name: str) -> ModuleType:
    """The module of an architecture, entropy model, patching scheme or modality. Raises ConfigError."""
    known = names(kind)
    if name not in known:
        raise ConfigError(unknown(TITLES[kind], name, known))
    package = f"{architectures()[name]}.{PARTS[kind]}" if kind in PARTS else f"bytelm.{kind}.{name}"
    return importlib.import_module(package)


def part(name: str, which: str) -> ModuleType | None:
    """A module of an architecture, such as `decoder`; None if there is none, or no such architecture."""
    package = architectures().get(name)
    return importlib.import_module(f"{package}.{which}") if package and has(package, which) else None


def part_of(value: Any, which: str) -> ModuleType | None:
    """`part` of the architecture of a model or a Config."""
    return part(name_of(value), which)


def name_of(value: Any) -> str:
    """The name by which `find` finds a component or its Config: "blt", "space", "image"."""
    module = type(value).__module__
    for name, package in architectures().items():
        if module.startswith(f"{package}."):
            return name
    return module.rpartition(".")[2]


def formats() -> dict[str, str]:
    """The layouts of published weights: the name of each, and the module that reads it."""
    found: dict[str, str] = {}
    for package in architectures().values():
        if has(package, "formats"):
            where = importlib.import_module(f"{package}.formats")
            found |= {m.name: f"{where.__name__}.{m.name}" for m in pkgutil.iter_modules(where.__path__)}
    return dict(sorted(found.items()))


@functools.cache
def architectures() -> dict[str, str]:
    """Each architecture's package. Those of bytelm are not replaced by installed ones of the same name."""
    here = importlib.import_module("bytelm.models")
    own = {m.name: f"{here.__name__}.{m.name}" for m in pkgutil.iter_modules(here.__path__)}
    return {point.name: point.value for point in entry_points(group=GROUP)} | own


@functools.cache
def has(package: str, which: str) -> bool:
    """Whether a package has a module or package of this name."""
    try:
        return find_spec(f"{package}.{which}") is not None
    except Exception as error:  # an installed package that is broken must not stop the architectures of all others
        removed = isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]
        if not removed:
            lines = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"ignoring {package}: it cannot be imported ({type(error).__name__}: {lines[0]})", stacklevel=2
            )
        return False


def unknown(what: str, value: str, known: list[str]) -> str:
    """The message for an unknown name: the nearest spelling, or else all names."""
    near = difflib.get_close_matches(value, known, n=1)
    return f"unknown {what} {value!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
