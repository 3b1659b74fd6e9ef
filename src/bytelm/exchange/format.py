"""The interface of a layout of published weights: `formats/NAME.py` of an architecture, with three functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.tensors import Stored
from bytelm.errors import UsageError
from bytelm.find import formats, unknown
from bytelm.interfaces.model import ByteModel

OWN = {"bytelm": "bytelm.exchange.own"}  # the layout of no architecture alone
MODALITY = "bytelm_modality"  # a key of ours in config.json, which other libraries ignore


@dataclass(frozen=True)
class Reading:
    """A checkpoint of another project, of which only names and shapes were read yet."""

    name: str
    recipe: Recipe
    context: int
    """Bytes."""
    table: list[tuple[str, str, str]]
    """Of each source tensor its name, dtype and shape, and our name; "" if it is left out."""
    tensors: Callable[[], Stored]
    """The weights under our names, best read while they are written, whereupon CheckpointError if one is not finite."""


@runtime_checkable
class Format(Protocol):
    """The functions of a layout."""

    def read(self, source: Path, sets: Mapping[str, Any], stack: ExitStack) -> Reading:
        """The contents of a source, overridden by `sets`; its files stay open as long as `stack`.

        Raises CheckpointError with a table of differences if the weights do not match the options, ConfigError for an
        unsupported option.
        """
        ...

    def write(self, folder: Path, recipe: Recipe, context: int, ours: dict[str, Tensor]) -> None:
        """Write a model's weights in this layout. Raises ConfigError for what it does not support."""
        ...

    def compared(self, source: Path, model: ByteModel, ids: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the source's own library after each of `ids`, and the corresponding ones of `ours`.

        Raises MissingExtraError without that library, UsageError if it has no such model.
        """
        ...


def find_layout(name: str) -> Format:
    """A layout by its name. Raises UsageError with the nearest spelling."""
    known = formats() | OWN
    if name not in known:
        raise UsageError(unknown("layout", name, list(known)))
    return cast("Format", importlib.import_module(known[name]))
