"""Whole documents of a modality: how much of one is given, and how many bytes the model adds to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bytelm.data.modalities.base import Modality, UnfitError
from bytelm.errors import DataError, UsageError

UNTOLD = 256  # bytes that are generated where nothing tells how many


@dataclass(frozen=True)
class Task:
    """What a document begins with, how many bytes the model may add, and whether it may end the document before."""

    prompt: bytes
    max_bytes: int
    eos: bool


def first_document(modality: Modality, name: str, data: bytes, notes: Counter[str]) -> bytes:
    """The first document in the file `name` that holds `data`. Raises DataError for a file that has none."""
    try:
        return next(document for document in modality.encode(name, data, notes) if document)
    except StopIteration:
        reason = "it is empty"
    except UnfitError as error:
        reason = str(error)
    raise DataError(f"{name} cannot be the prompt ({reason}): give a file like those the run was trained on")


def completion(modality: Modality, document: bytes, keep: float = 0.5, max_bytes: int | None = None) -> Task:
    """To write the rest of a document anew, of which the share `keep` is given, rounded down to whole rows.

    It gets as many bytes as it had, or `max_bytes` more than are given. Raises UsageError for a share outside [0, 1].
    """
    if not 0 <= keep <= 1:
        raise UsageError(f"keep {keep} is not in [0, 1]: give the fraction of the file that is the prompt, such as 0.5")
    row = max(modality.row, modality.unit)
    given = document[: int(len(document) * keep) // row * row]
    return continuation(modality, given, max_bytes, len(document))


def continuation(modality: Modality, prompt: bytes, max_bytes: int | None = None, size: int | None = None) -> Task:
    """To go on after the first bytes of a document, of which there may be none, by `max_bytes` in whole units.

    Where they are not given, to the end of a document of `size` bytes, or of the size that all have; where that is not
    known either, by 256 or less. Raises UsageError for a prompt longer than a document, or a negative `max_bytes`.
    """
    size = modality.size or size
    if size is not None and len(prompt) > size:
        raise UsageError(f"the prompt has {len(prompt)} bytes, and a document of this run {size}: shorten it")
    if size is not None and max_bytes is None:
        return Task(prompt, size - len(prompt), eos=False)
    more = UNTOLD if max_bytes is None else max_bytes
    if more < 0:
        raise UsageError(f"max_bytes {more} is negative: give 0 or more")
    end = (len(prompt) + more) // modality.unit * modality.unit
    return Task(prompt, max(0, min(end, modality.size or end) - len(prompt)), eos=size is None)
