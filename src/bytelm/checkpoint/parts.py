"""The tensors of a checkpoint, each in one part or several, read when they are needed and checked part by part.

    model.safetensors                             of one process: every tensor is one part
    model-00000.safetensors   model-00000.json    of several: what process 0 wrote, and its index
    model-00001.safetensors   model-00001.json

An index says of each tensor of its file which part of it that is:

    {"tensors": {"blocks.0.weight": {"dtype": "F32", "whole": [10, 4], "offsets": [5, 0], "shape": [5, 4],
                                     "start": 128, "sha256": "..."}}}

`start` is its first byte in the file. Of one tensor each file has one part, under the tensor's name. Files are read by
position. What is read is compared with the checksums of parts; a file without these is compared as a whole first.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelm.checkpoint import legacy, manifest
from bytelm.checkpoint.tensors import NAMED, located, rows_of
from bytelm.checkpoint.writing import Entry
from bytelm.data.files import JoinedReader, PositionReader
from bytelm.errors import CheckpointError

AGAIN = "load it again"
PIECE = 16 << 20  # bytes that are hashed together
MOST = 1 << 63  # values of a tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A box of a tensor: what one file has of it, row after row."""

    opened: Callable[[], PositionReader]
    """Its file, opened once."""
    path: Path
    size: int
    """Of the file, in bytes."""
    start: int
    """Its first byte."""
    offsets: Shape
    shape: Shape
    sha256: str | None
    """Of its bytes, where that is known; the file was compared as a whole otherwise."""

    @property
    def box(self) -> tuple[slice, ...]:
        """What it is of the whole tensor."""
        return tuple(slice(first, first + count) for first, count in zip(self.offsets, self.shape, strict=True))

    def check(self, name: str, digest: str) -> None:
        """Compare the checksum of what was read. Raises CheckpointError."""
        if self.sha256 and digest != self.sha256:
            raise CheckpointError(f"{self.path} is damaged: the checksum of {name} is not that in its manifest")

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """First row and values of runs of its rows, of about 16 MiB; after the last one the checksum is compared.

        A part without rows or dimensions is one run. Raises CheckpointError.
        """
        row = dtype.itemsize * math.prod(self.shape[1:])
        rows = self.shape[0] if self.shape else 1
        step = max(1, PIECE // max(1, row))
        digest = hashlib.sha256()
        for first in range(0, max(1, rows), step):
            count = min(step, rows - first)
            found = torch.empty((count, *self.shape[1:]) if self.shape else (), dtype=dtype)
            data = found.reshape(-1).view(torch.uint8).numpy()
            self.opened().read_into(self.start + first * row, data)
            digest.update(data.data)
            yield first, found
        self.check(name, digest.hexdigest())


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, of which only name, shape and dtype were read."""

    name: str
    like: Tensor
    """On the meta device, of its shape and dtype."""
    parts: tuple[Part, ...]
    """In the order of their offsets; together they are the whole of it, and no two have a value in common."""

    @property
    def path(self) -> Path:
        """Its first file."""
        return self.parts[0].path

    @property
    def start(self) -> int:
        """Its first byte in that file."""
        return self.parts[0].start

    @property
    def has_checksums(self) -> bool:
        """Whether those of all its parts are known, as of what bytelm saved."""
        return all(part.sha256 for part in self.parts)

    @property
    def by_rows(self) -> bool:
        """Whether it is cut along the first axis alone, so that its parts in turn are its bytes."""
        return all(part.shape[1:] == tuple(self.like.shape[1:]) for part in self.parts)

    def opened_for_rows(self) -> tuple[PositionReader | JoinedReader, int]:
        """Its files, opened once more to read rows here and there, and its first byte there.

        Raises CheckpointError if they are other files now, or if it is not cut by rows.
        """
        if not self.by_rows:
            raise CheckpointError(f'{self.name} of {self.path.parent} is not cut by rows: load it with tables="memory"')
        found: list[tuple[PositionReader, int, int]] = []
        for part in self.parts:
            file = PositionReader(part.path, part.size, CheckpointError, AGAIN, random=True)
            file.check(part.opened())
            found.append((file, part.start, math.prod(part.shape) * self.like.element_size()))
        return (found[0][0], found[0][1]) if len(found) == 1 else (JoinedReader(found), 0)

    def read(self, room: Tensor | None = None) -> Tensor:
        """The tensor, in `room` (uint8, as large or larger), or in memory of its own.

        Raises CheckpointError if it is not what was saved.
        """
        if room is None:
            room = torch.empty(self.like.nbytes, dtype=torch.uint8)
        found = room[: self.like.nbytes].view(self.like.dtype).view(self.like.shape)
        if not self.by_rows:
            for part in self.parts:
                inside = found[part.box]
                for first, rows in part.pieces(self.name, self.like.dtype):
                    inside[first : first + len(rows)] = rows
            return found
        at = 0
        for part in self.parts:
            data = room[at : at + math.prod(part.shape) * self.like.element_size()].numpy()
            part.opened().read_into(part.start, data)
            if part.sha256:
                part.check(self.name, hashlib.sha256(data.data).hexdigest())
            at += len(data)
        return found

    def pieces(self) -> Iterator[Tensor]:
        """It in runs of its rows, in order; see `read`."""
        if not self.by_rows:
            whole = self.read()
            yield from whole.split(rows_of(whole))
            return
        for part in self.parts:
            for _, rows in part.pieces(self.name, self.like.dtype):
                yield rows

    def digest(self) -> str:
        """The sha256 of its bytes, in hexadecimal, however it is cut."""
        if len(self.parts) == 1 and self.parts[0].sha256:
            return self.parts[0].sha256
        digest = hashlib.sha256()
        for rows in self.pieces():
            digest.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def is_sharded(checkpoint: Path, group: str) -> bool:
    """Whether several processes wrote a group of a checkpoint. Raises CheckpointError where it has no manifest."""
    return bool(_indexes(manifest.files(checkpoint), group))


def _indexes(files: Iterable[str], group: str) -> list[str]:
    return sorted(name for name in files if re.fullmatch(rf"{re.escape(group)}-\d{{5,}}\.json", name))


def own_tensors(
    checkpoint: Path, group: str = "model", *, checked: bool = True, hold: bool = True
) -> dict[str, StoredTensor]:
    """The tensors of a group of a checkpoint, by our names. Raises CheckpointError.

    A file without checksums of all tensors is `checked` as a whole. `hold`: the files of all parts are opened now, so
    that they can be read even if a training removes the checkpoint; otherwise each when it is first read.
    """
    files = manifest.files(checkpoint)
    if indexes := _indexes(files, group):
        return _sharded(checkpoint, indexes, files, hold)
    entry = manifest.entry_of(checkpoint, f"{group}.safetensors")
    if checked and not entry.tensors:
        manifest.verify(checkpoint)
    found = in_file(checkpoint / f"{group}.safetensors", entry.size, entry.tensors)
    if checked and entry.tensors and not all(tensor.has_checksums for tensor in found.values()):
        manifest.verify(checkpoint)
    return found


def in_file(path: Path, size: int | None, sums: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file of `size` bytes, with their checksums."""
    try:
        size = path.stat().st_size if size is None else size
    except OSError as error:
        why = f"has no {path.name}" if isinstance(error, FileNotFoundError) else f"{path.name}: {error.strerror}"
        raise CheckpointError(f"{path.parent} {why}: copy or download the whole folder") from None
    file = PositionReader(path, size, CheckpointError, AGAIN)
    try:
        listed = list(located(partial(_bytes, file), size))
    except (
        ValueError,
        CheckpointError,
        RuntimeError,
        OverflowError,
    ) as error:  # RuntimeError: see `store.read_tensors`
        why = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({why}): copy or download it again") from error
    found: dict[str, StoredTensor] = {}
    for name, like, start in listed:
        part = Part(lambda: file, path, size, start, (0,) * like.ndim, tuple(like.shape), sums.get(name))
        found[legacy.tensor_name(name)] = StoredTensor(name, like, (part,))
    return found


def _bytes(file: PositionReader, start: int, size: int) -> bytes:
    """Some bytes of a file."""
    data = np.empty(size, np.uint8)
    file.read_into(start, data)
    return data.tobytes()


# ---- of several files ----


def _sharded(
    checkpoint: Path, indexes: Sequence[str], files: Mapping[str, Entry], hold: bool
) -> dict[str, StoredTensor]:
    found: dict[str, tuple[torch.dtype, Shape, list[Part]]] = {}
    for name in indexes:
        path = (checkpoint / name).with_suffix(".safetensors")
        if path.name not in files:
            raise CheckpointError(f"{checkpoint} has {name}, but no {path.name}: copy or download it again")
        opener = cache(partial(PositionReader, path, files[path.name].size, CheckpointError, AGAIN))
        if hold:
            opener()
        listed = manifest.json_object(checkpoint / name, manifest.read(checkpoint, name)).get("tensors")
        try:
            for tensor, dtype, whole, part in _in_index(listed, path, files[path.name].size, opener):
                other = found.setdefault(tensor, (dtype, whole, []))
                if other[:2] != (dtype, whole):
                    raise ValueError(f"{tensor!r} is {dtype} {list(whole)} there, {other[0]} {list(other[1])} before")
                other[2].append(part)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint / name} is not an index that can be read: {error}") from None
    tensors: dict[str, StoredTensor] = {}
    for name, (dtype, whole, parts) in found.items():
        parts.sort(key=lambda part: part.offsets)
        if not covers(whole, parts):
            raise CheckpointError(f"{checkpoint}: the parts of {name!r} are not the whole of it: save it again")
        tensors[name] = StoredTensor(name, torch.empty(whole, dtype=dtype, device="meta"), tuple(parts))
    return tensors


def _in_index(
    listed: Any, path: Path, size: int, opener: Callable[[], PositionReader]
) -> Iterator[tuple[str, torch.dtype, Shape, Part]]:
    """Name, dtype, shape of the whole, and part, of each tensor of an index. Raises ValueError."""
    if not isinstance(listed, dict):
        raise ValueError("it names no tensors")
    for name, entry in listed.items():
        match entry:
            case {
                "dtype": str(kind),
                "whole": [*whole],
                "offsets": [*offsets],
                "shape": [*shape],
                "start": int(start),
                "sha256": str(sha256),
            } if kind in NAMED:
                pass
            case _:
                raise ValueError(f"{name!r} is not described as part of a tensor")
        counts = all(type(count) is int and 0 <= count < MOST for count in (start, *whole, *offsets, *shape))
        if not counts or not len(whole) == len(offsets) == len(shape) or math.prod(whole) >= MOST:
            raise ValueError(f"{name!r} is {shape} at {offsets} of {whole}")
        if any(at + count > all_ for at, count, all_ in zip(offsets, shape, whole, strict=True)):
            raise ValueError(f"{name!r} is {shape} at {offsets}, outside of {whole}")
        if start + math.prod(shape) * NAMED[kind].itemsize > size:
            raise ValueError(f"{name!r} ends behind the end of {path.name}")
        part = Part(opener, path, size, start, tuple(offsets), tuple(shape), sha256)
        yield name, NAMED[kind], tuple(whole), part


def covers(whole: Shape, parts: Sequence[Part]) -> bool:
    """Whether parts, in the order of their offsets and all within a tensor, are the whole of it, each value once."""
    if sum(math.prod(part.shape) for part in parts) != math.prod(whole):
        return False
    if all(part.shape[1:] == whole[1:] for part in parts):  # by rows: there may be many
        ends = [part.offsets[0] + part.shape[0] for part in parts[:-1]] if whole else []
        return len(parts) == 1 or [part.offsets[0] for part in parts[1:]] == ends
    return not any(_overlap(one, other) for one, other in combinations(parts, 2))


def _overlap(one: Part, other: Part) -> bool:
    return all(
        max(a, b) < min(a + m, b + n)
        for a, m, b, n in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    )
