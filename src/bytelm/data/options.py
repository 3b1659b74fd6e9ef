"""The table [data] of a configuration: how files become documents."""

from __future__ import annotations

from dataclasses import dataclass

from bytelm.data.decode import MAX_WINDOW
from bytelm.errors import ConfigError

MAX_BAD = 0.001  # of the lines of a file, the rows of one, or the images or clips of a source


@dataclass(frozen=True)
class DataConfig:
    """How files become documents. `valid` and `test` are fractions of the bytes, dealt out by document.

    `text_field`: which field of a JSON line, column of a Parquet file or feature of a dataset is the document.
    `max_bad`: the fraction of lines, rows, images or clips that may be damaged; they are skipped and counted.
    `max_window`: MiB that the window of a compressed file (a dictionary, in xz) may take of memory.
    `strict`: whether a file that would be skipped is an error.
    `deduplicate`: whether of documents with equal bytes only the first is in a split.
    """

    text_field: str = "text"
    valid: float = 0.05
    test: float = 0.05
    seed: int = 0
    max_bad: float = MAX_BAD
    max_window: int = MAX_WINDOW
    strict: bool = False
    deduplicate: bool = False

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not (self.valid >= 0 and self.test >= 0 and self.valid + self.test < 1):
            problems.append(
                f"data.valid = {self.valid} and data.test = {self.test}: "
                "they must not be negative, and together be less than 1"
            )
        if not 0 <= self.max_bad <= 1:
            problems.append(f"data.max_bad = {self.max_bad}: must be a fraction between 0 and 1")
        if not 1 <= self.max_window <= 2048:
            problems.append(f"data.max_window = {self.max_window}: must be between 1 and 2048 (MiB)")
        if problems:
            raise ConfigError("; ".join(problems))
