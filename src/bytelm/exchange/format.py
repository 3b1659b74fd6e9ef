"""What a layout of published weights is: a file `formats/NAME.py` of an architecture, with three functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.errors import UsageError
from bytelm.find import formats, unknown
from bytelm.interfaces.model import ByteModel

MODALITY = "bytelm_modality"  # a key of ours in config.json, which other libraries pass over


@dataclass(frozen=True)
class Reading:
    """A checkpoint of another project, of which nothing but names and shapes was read yet."""

    name: str
    recipe: Recipe
    context: int
    """Bytes."""
    table: list[tuple[str, str, str]]
    """Of each tensor of theirs its name, dtype and shape, and the name of ours; "" where it is left out."""
    tensors: Callable[[], dict[str, Tensor]]
    """Reads the weights: ours by our names."""


@runtime_checkable
class Format(Protocol):
    """The functions of such a file."""

    def read(self, source: Path, sets: Mapping[str, Any], stack: ExitStack) -> Reading:
        """What a source holds; its files stay open as long as `stack`.

        `sets` says what the source says wrongly or not at all. Raises CheckpointError with a table of differences where
        weights are not those that the options describe, ConfigError for an option that is not supported.
        """
        ...

    def write(self, folder: Path, recipe: Recipe, context: int, ours: dict[str, Tensor]) -> None:
        """Write a model's weights as that project reads them. Raises ConfigError for what it cannot say."""
        ...

    def compared(self, source: Path, model: ByteModel, ids: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the source's own library after each of `ids`, and those of `ours` that go with them.

        Raises MissingExtraError without that library, UsageError where it has no such model.
        """
        ...


def find_layout(name: str) -> Format:
    """A layout by its name. Raises UsageError with the nearest spelling."""
    known = formats()
    if name not in known:
        raise UsageError(unknown("layout", name, list(known)))
    return cast("Format", importlib.import_module(known[name]))
