"""The manifest of a checkpoint: which files there are, their sizes and checksums, and checks of each against it.

Nothing of a checkpoint is believed before it was compared with its manifest, which has a checksum of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from bytelm.checkpoint.writing import Entry
from bytelm.errors import CheckpointError
from bytelm.units import show_bytes

FORMAT = 2  # of a checkpoint that one process wrote
SHARDED = 3  # of one that several wrote: see `checkpoint.sharded`; a reader refuses a higher one
MANIFEST = "MANIFEST.json"
MOST_TEXT = 1 << 26  # bytes of a JSON file: a larger one is not ours, and would be read whole


def text(step: int, files: Mapping[str, Entry], form: int = FORMAT) -> bytes:
    """The manifest of a checkpoint of format `form`."""
    try:
        version = importlib.metadata.version("bytelm")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    body: dict[str, Any] = {"format": form, "bytelm": version, "step": step}
    body["files"] = {name: entry.table() for name, entry in files.items()}
    return json.dumps({**body, "sha256": digest(body)}, indent=1).encode()


def digest(body: Mapping[str, Any]) -> str:
    """The manifest's checksum of itself: without it, damage there would be blamed on another file or go unseen."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify(path: Path, *, closely: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError naming the file and its fault.

    `closely`: by checksums. Otherwise the manifest by its own, and of other files their sizes, which reads no weights:
    whoever reads them then checks what it reads. `share` (i, n): of every n files the i-th alone, where n processes
    check one checkpoint together.
    """
    listed = files(path)
    # Desktops and network disks create dot files anywhere; they are ignored.
    found = {p.name for p in path.iterdir() if not p.name.startswith(".")} - {MANIFEST}
    for name in sorted(listed.keys() - found):
        raise CheckpointError(f"{path / name} is missing, though {MANIFEST} names it")
    for name in sorted(found - listed.keys()):
        raise CheckpointError(f"{path / name} is not listed in {MANIFEST}: remove it")
    for name, entry in list(listed.items())[share[0] :: share[1]]:
        with opened(path / name) as stream:
            (check if closely else check_size)(path / name, stream, entry)


def read(path: Path, name: str) -> bytes:
    """One file of a checkpoint, checked."""
    entry = entry_of(path, name)
    with opened(path / name) as stream:
        check_size(path / name, stream, entry)
        data = whole(path / name, stream)
    check(path / name, io.BytesIO(data), entry)
    return data


def entry_of(path: Path, name: str) -> Entry:
    """What the manifest of a checkpoint says of one of its files. Raises CheckpointError, also if it has no such file.

    Of each tensor the checksum is that of its bytes; older checkpoints have none.
    """
    listed = files(path)
    if name not in listed:
        raise CheckpointError(f"{path} has no {name}: it has {', '.join(sorted(listed))}")
    return listed[name]


def files(path: Path) -> dict[str, Entry]:
    """The manifest of a checkpoint: name → size and checksum."""
    file = path / MANIFEST
    with opened(file) as stream:
        body = json_object(file, whole(file, stream))
    version = body.get("format")
    if isinstance(version, int) and version > SHARDED:
        raise CheckpointError(
            f"{path} was made by a newer bytelm: format {version}, this one reads up to {SHARDED}: upgrade bytelm"
        )
    if body.pop("sha256", None) != digest(body):
        raise CheckpointError(f"{file} is damaged: its own checksum does not fit")
    try:
        return {name: Entry.of(entry) for name, entry in body["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a manifest: {error!r}") from error


def check(file: Path, stream: io.BufferedReader | io.BytesIO, entry: Entry) -> None:
    """Compare size and checksum of a file, of which `stream` gives the bytes, with its entry in the manifest."""
    check_size(file, stream, entry)
    if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
        raise CheckpointError(f"{file} is damaged: its checksum is not that in {MANIFEST}")


def check_size(file: Path, stream: io.BufferedReader | io.BytesIO, entry: Entry) -> None:
    """Compare the size of a file alone, and go back to its start."""
    size = stream.seek(0, io.SEEK_END)
    if size != entry.size:
        which = "cut short" if size < entry.size else "too long"
        raise CheckpointError(f"{file} is {which}: {MANIFEST} says {entry.size} bytes")
    stream.seek(0)


@contextlib.contextmanager
def opened(file: Path) -> Generator[io.BufferedReader]:
    """Open a file of a checkpoint; whatever the disk refuses is a CheckpointError that names the file."""
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{file} is {'not a plain file' if file.exists() else 'missing'}")
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def whole(file: Path, stream: io.BufferedReader) -> bytes:
    """All of a JSON file, if it is of a size that one has."""
    data = stream.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise CheckpointError(f"{file} is too long: more than {show_bytes(MOST_TEXT)}, which no {file.name} has")
    return data


def json_object(file: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which was read from `file`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return cast("dict[str, Any]", value)
