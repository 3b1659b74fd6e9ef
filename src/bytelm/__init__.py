"""Language models over raw bytes: any file as input, no tokenizer, exact cached generation.

import bytelm
lm = bytelm.load("runs/demo")
lm.generate(b"def main(")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytelm.errors import BytelmError as BytelmError
    from bytelm.lm import LM as LM
    from bytelm.lm import load as load
    from bytelm.training.finish import train as train
    from bytelm.training.settings import configure as configure

__version__ = "0.1.0"

# Resolved when first used, so that `import bytelm` costs nothing and imports no torch.
_HOMES = {
    "BytelmError": "bytelm.errors",
    "LM": "bytelm.lm",
    "configure": "bytelm.training.settings",
    "load": "bytelm.lm",
    "train": "bytelm.training.finish",
}

__all__ = ["LM", "BytelmError", "__version__", "configure", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bytelm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
