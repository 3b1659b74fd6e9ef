"""Datasets of the Hugging Face hub, or in its layout in a folder, streamed: hf:NAME[:CONFIG][@REVISION][#SPLIT].

    hf:roneneldan/TinyStories                    the split "train" of the newest revision
    hf:wikimedia/wikipedia:20231101.de@b04c8d1   the configuration 20231101.de as of a commit
    hf:./folder#validation                       a folder of .json, .parquet, .csv or .txt files
    hf:./saved                                   a dataset written by save_to_disk

@ means a revision as in the hub's own addresses, unless there is a folder of that name. Datasets are data: since
version 4 the library runs no scripts of theirs.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelm.data.decode import in_pieces
from bytelm.data.files import LONGEST, shown
from bytelm.data.names import after_prefix
from bytelm.data.report import SourceReport, check_bad
from bytelm.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class _Dataset:
    name: str
    config: str | None
    revision: str | None
    split: str | None


def is_dataset(path: str) -> bool:
    """Whether a path names a dataset."""
    return after_prefix(path) is not None


def texts(path: str, text_field: str | None, report: SourceReport, max_bad: float) -> Iterator[Iterator[bytes]]:
    """The feature `text_field` of each row, in pieces. Rows without a string or bytes in it, or too long, are bad.

    Raises DataError for what cannot be loaded and too many bad rows, MissingExtraError without the library.
    """
    if text_field is None:
        raise DataError(f"{path} gives text, and --as needs files: leave one of the two out")
    datasets, asked = _library(path), _parsed(path)
    total = bad = 0
    try:
        rows = _saved(datasets, asked, path) if _is_saved(asked.name) else _streamed(datasets, asked)
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
    if _is_saved(asked.name):
        return _times(asked.name)
    try:
        return str(datasets.load_dataset_builder(asked.name, asked.config, revision=asked.revision).hash)
    except Exception as error:  # as above
        raise _cannot(path, error) from error


def _parsed(path: str) -> _Dataset:
    rest = after_prefix(path) or ""
    # The longest folder that it begins with is one whatever is in its name
    ends = [i for i in range(len(rest), 0, -1) if (rest + ":")[i] in ":@#" and os.path.isdir(rest[:i])]  # noqa: PTH112
    name = rest[: ends[0]] if ends else re.split("[:@#]", rest)[0]
    found = re.fullmatch(r"(?::([^@#]+))?(?:@([^#]+))?(?:#(.+))?", rest[len(name) :])
    if not name or found is None:
        raise DataError(f"{shown(path)} names no dataset: write hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]")
    if not ends and "/" not in name:  # such names are loaders of the library, or of old
        raise DataError(f"{shown(path)} names no dataset: write hf:OWNER/NAME, or hf:./FOLDER")
    config, revision, split = found.groups()
    if ends and not _is_saved(name) and (odd := re.search(r"[*?[]|::", str(Path(name).absolute()))):
        raise DataError(
            f"{shown(path)}: {odd[0]!r} in the name of a folder makes a pattern of it to the library: rename the folder"
        )
    return _Dataset(name, config, revision, split)


def _streamed(datasets: Any, asked: _Dataset) -> Any:
    split = asked.split or "train"
    return datasets.load_dataset(asked.name, asked.config, split=split, revision=asked.revision, streaming=True)


def _is_saved(name: str) -> bool:
    """Whether it was written by save_to_disk: one split, or a folder for each."""
    return any(os.path.isfile(f"{name}/{mark}") for mark in ("state.json", "dataset_dict.json"))  # noqa: PTH113


def _saved(datasets: Any, asked: _Dataset, path: str) -> Any:
    """The memory-mapped rows of a dataset written by save_to_disk. Raises DataError for a missing part."""
    if asked.config or asked.revision:
        raise DataError(f"{shown(path)} was written by save_to_disk, and has no configurations or revisions")
    rows = datasets.load_from_disk(asked.name)
    if not isinstance(rows, datasets.DatasetDict):
        own = str(rows.split or "train")
        if asked.split not in (None, own):
            raise DataError(f"{shown(path)} was saved as one split alone: leave #{asked.split} out")
        return rows
    if (asked.split or "train") not in rows:
        raise DataError(f"{shown(path)} has no split {asked.split or 'train'!r}: it has {', '.join(rows)}")
    return rows[asked.split or "train"]


def _times(folder: str) -> str:
    """A hash of the names, sizes and times of change of the files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(os.fsencode(path))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _bytes(value: Any) -> bytes | None:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return data if isinstance(data, bytes) and len(data) <= LONGEST else None


def _no_field(path: str, text_field: str, features: list[str]) -> DataError:
    return DataError(f"{path} has no {text_field!r}: use --set data.text_field=NAME; it has {', '.join(features[:20])}")


def _cannot(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"{shown(path)} cannot be loaded ({reason}): check the name, the split and the network")


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"reading {shown(path)}") from error
    return datasets
