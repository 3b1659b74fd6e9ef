"""Pictures, sound and the like on the command line: a file as the prompt, and what was generated as a file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from bytelm.cli.common import STDIN, counter, text_of
from bytelm.data.modalities.base import Modality
from bytelm.errors import ResourceError, UsageError
from bytelm.generate.document import UNTOLD, Task, completion, continuation, first_document


def task_of(modality: Modality | None, argument: str, hex: bool, keep: float | None, max_bytes: int | None) -> Task:
    """What a prompt asks for. In a run with a modality a file is a document, of which the share `keep` is given.

    Raises UsageError and DataError. What was lost in the conversion of the file is told on standard error.
    """
    from bytelm.data.files import shown

    data = text_of(argument, hex)
    if modality is not None and (argument == STDIN or argument.startswith("@")):
        name = "standard input" if argument == STDIN else shown(argument[1:])
        notes: Counter[str] = Counter()
        document = first_document(modality, name, data, notes)
        for note in notes:
            print(f"{name}: {note}", file=sys.stderr)
        return completion(modality, document, 0.5 if keep is None else keep, max_bytes)
    if keep is not None:
        raise UsageError(
            f"keep {keep} needs a run trained --as image or the like, and a file as the prompt: @photo.png"
        )
    if modality is None:
        return Task(data, UNTOLD if max_bytes is None else max_bytes, eos=True)
    return continuation(modality, data, max_bytes)


def check_file(path: Path, modality: Modality | None, for_text: bool) -> None:
    """Refuse, before anything is generated, a file that could not be written afterwards.

    Raises UsageError, and MissingExtraError for a package that the kind of file needs.
    """
    if modality is None:
        raise UsageError(
            f"{path} needs a run trained --as image, audio or the like, and this one was not: leave it out"
        )
    if path.suffix.lower() != modality.suffix:
        raise UsageError(f"{path} cannot be written: this run makes {modality.suffix} files; end the name with that")
    if for_text:
        raise UsageError(f"{path} is not made of text: leave out --stop and --utf8")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {path.parent} is no folder to write it in; choose another place")
    modality.decode(b"")  # which asks for whatever package it needs


def write_file(path: Path, modality: Modality, document: bytes) -> None:
    """Write the file that shows a document, whole or not at all. Raises ResourceError."""
    from bytelm.data.files import write_whole

    try:
        write_whole(path, modality.decode(document))
    except OSError as error:
        raise ResourceError(f"cannot write {path} ({error.strerror}): choose another place for it") from error


def collected(pieces: Iterable[bytes], total: int, quiet: bool) -> bytes:
    """All the pieces, of `total` bytes at the most, counted on a terminal as they come."""
    progress = counter("generating", total, quiet)

    def counted() -> Iterator[bytes]:
        for piece in pieces:
            if progress:
                progress(len(piece))
            yield piece

    return b"".join(counted())
