"""Datasets of the Hugging Face hub, or in its layout in a folder, streamed: hf:NAME[:CONFIG][@REVISION][#SPLIT].

    hf:roneneldan/TinyStories                    the split "train" of the newest revision
    hf:wikimedia/wikipedia:20231101.de@b04c8d1   the configuration 20231101.de as of a commit
    hf:./folder#validation                       a folder of .json, .parquet, .csv or .txt files

@ means a revision as in the hub's own addresses. Datasets are data: since version 4 the library runs no scripts of
theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bytelm.data.decode import in_pieces
from bytelm.data.files import LONGEST, shown
from bytelm.data.report import SourceReport, check_bad
from bytelm.errors import DataError, MissingExtraError

PREFIX = "hf:"


@dataclass(frozen=True)
class _Dataset:
    name: str
    config: str | None
    revision: str | None
    split: str


def is_dataset(path: str) -> bool:
    """Whether a path names a dataset. A file whose name begins so is written ./hf:…"""
    return path.startswith(PREFIX)


def texts(path: str, text_field: str | None, report: SourceReport, max_bad: float) -> Iterator[Iterator[bytes]]:
    """The feature `text_field` of each row, in pieces. Rows without a string or bytes in it, or too long, are bad.

    Raises DataError for what cannot be loaded and too many bad rows, MissingExtraError without the library.
    """
    if text_field is None:
        raise DataError(f"{path} gives text, and what is read with --as must be files: leave one of the two out")
    datasets, asked = _library(path), _parsed(path)
    total = bad = 0
    try:
        rows = datasets.load_dataset(
            asked.name, asked.config, split=asked.split, revision=asked.revision, streaming=True
        )
        features = None if rows.features is None else list(rows.features)
        if features is not None and text_field not in features:
            raise _no_field(path, text_field, features)
        for row in rows.select_columns([text_field]) if features else rows:
            total += 1
            text = _bytes(row.get(text_field))
            if text is None:
                bad += 1
            else:
                yield in_pieces([text])
    except GeneratorExit:  # left half read, perhaps as the interpreter ends and the names below are gone
        raise
    except DataError:
        raise
    except Exception as error:  # the library raises what it runs into on the way: of networks, files, formats
        raise _cannot(path, error) from error
    report.files += 1
    report.bad += bad
    check_bad(path, bad, total, f"rows have no string in data.text_field = {text_field!r}, or one too long", max_bad)


def fingerprint(path: str) -> str:
    """The commit of a dataset of the hub; of one in a folder, a hash of the files' times of change."""
    datasets, asked = _library(path), _parsed(path)
    try:
        return str(datasets.load_dataset_builder(asked.name, asked.config, revision=asked.revision).hash)
    except Exception as error:  # as above
        raise _cannot(path, error) from error


def _parsed(path: str) -> _Dataset:
    found = re.fullmatch(r"hf:([^:@#]+)(?::([^@#]+))?(?:@([^#]+))?(?:#(.+))?", path)
    if found is None:
        raise DataError(f"{shown(path)} names no dataset: write hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]")
    name, config, revision, split = found.groups()
    if not os.path.isdir(name) and "/" not in name:  # noqa: PTH112  # such names are loaders of the library, or of old
        raise DataError(f"{shown(path)} names no dataset: write hf:OWNER/NAME, or hf:./FOLDER")
    return _Dataset(name, config, revision, split or "train")


def _bytes(value: Any) -> bytes | None:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return data if isinstance(data, bytes) and len(data) <= LONGEST else None


def _no_field(path: str, text_field: str, features: list[str]) -> DataError:
    return DataError(f"{path} has no {text_field!r}: say --set data.text_field=NAME; it has {', '.join(features[:20])}")


def _cannot(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"{shown(path)} cannot be loaded ({reason}): see to the name, the split and the network")


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"reading {shown(path)}") from error
    return datasets
