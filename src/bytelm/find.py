"""Name → module, resolved when it is used: `find("patching", "space")` imports one file and nothing else.

A new architecture or patching scheme is one new file in its folder; there is no register to keep.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from bytelm.errors import ConfigError

# The folders that hold one thing a file, and the files in them that are shared ground rather than one of the things.
GROUND = {
    "data.modalities": {"base"},
    "models": {"base", "inference", "objective"},
    "patching": {"base", "layout"},
    "scorers": set(),
}


def names(floor: str) -> list[str]:
    """The names that `find(floor, name)` takes, sorted. No module of the floor's files is imported for it."""
    package = importlib.import_module(f"bytelm.{floor}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in GROUND[floor])


def find(floor: str, name: str) -> ModuleType:
    """The module of one architecture or patching scheme. Raises ConfigError with the nearest spelling."""
    known = names(floor)
    if name not in known:
        raise ConfigError(unknown(f"{floor} name", name, known))
    return importlib.import_module(f"bytelm.{floor}.{name}")


def unknown(what: str, value: str, known: list[str]) -> str:
    """The sentence for a name that is not known: the nearest spelling, or what exists where nothing is near."""
    near = difflib.get_close_matches(value, known, n=1)
    return f"unknown {what} {value!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
