"""Images, audio and other modalities on the command line: a file as the prompt, generated data as a file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from bytelm.cli.common import STDIN, counter, text_of
from bytelm.data.modalities.base import Modality
from bytelm.errors import ResourceError, UsageError
from bytelm.generate.document import UNNAMED, Task, completion, continuation, first_document


def task_of(modality: Modality | None, argument: str, hex: bool, keep: float | None, max_bytes: int | None) -> Task:
    """The task of a prompt. In a run with a modality a file is a document, of which the fraction `keep` is the prompt.

    Raises UsageError and DataError. Lossy conversions of the file are reported on standard error.
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
            f"--keep {keep} needs a run trained --as image or the like, and a file as the prompt: @photo.png"
        )
    if modality is None:
        return Task(data, UNNAMED if max_bytes is None else max_bytes, eos=True)
    return continuation(modality, data, max_bytes)


def check_file(path: Path, modality: Modality | None, for_text: bool) -> None:
    """Refuse, before anything is generated, a file that could not be written afterwards.

    Raises UsageError, and MissingExtraError for a package that the kind of file needs.
    """
    if modality is None:
        raise UsageError(
            f"{path} needs a run trained --as image, audio or the like, which this one was not: leave it out"
        )
    if path.suffix.lower() != modality.suffix:
        raise UsageError(f"{path} cannot be written: this run generates {modality.suffix} files; use that suffix")
    if for_text:
        raise UsageError(f"{path} is not text: leave out --stop and --utf8")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {path.parent} is not a writable folder; choose another place")
    modality.decode(b"")  # raises MissingExtraError if its package is missing


def write_file(path: Path, modality: Modality, document: bytes) -> None:
    """Decode a document to a file and write it atomically. Raises ResourceError."""
    from bytelm.data.files import write_whole

    try:
        write_whole(path, modality.decode(document))
    except OSError as error:
        raise ResourceError(f"cannot write {path} ({error.strerror}): choose another place for it") from error


def collected(pieces: Iterable[bytes], total: int, quiet: bool) -> bytes:
    """All pieces joined, at most `total` bytes, with progress on a terminal."""
    progress = counter("generating", total, quiet)

    def counted() -> Iterator[bytes]:
        for piece in pieces:
            if progress:
                progress(len(piece))
            yield piece

    return b"".join(counted())
