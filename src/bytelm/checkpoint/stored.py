"""The tensors of a checkpoint, read one by one when they are needed, and checked one by one.

A file is read by position. What is read of it is compared with the manifest's checksums of tensors; a checkpoint of
before these were written is compared as a whole first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bytelm.checkpoint import legacy, pretrained, store
from bytelm.checkpoint.tensors import located
from bytelm.data.files import PositionReader
from bytelm.errors import CheckpointError

AGAIN = "load it again"
PIECE = 16 << 20  # bytes that are hashed together


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, of which only name, shape and dtype were read."""

    name: str
    like: Tensor
    """On the meta device, of its shape and dtype."""
    file: PositionReader
    path: Path
    size: int
    """Of the file, in bytes."""
    start: int
    """Its first byte."""
    sha256: str | None
    """Of its bytes, where that is known; the file was compared as a whole otherwise."""

    def opened_for_rows(self) -> PositionReader:
        """The file, opened once more to read rows here and there. Raises CheckpointError if it is another one now."""
        found = PositionReader(self.path, self.size, CheckpointError, AGAIN, random=True)
        found.check(self.file)
        return found

    def read(self, room: Tensor | None = None) -> Tensor:
        """The tensor, in `room` (uint8, as large or larger), or in memory of its own.

        Raises CheckpointError if it is not what was saved.
        """
        if room is None:
            room = torch.empty(self.like.nbytes, dtype=torch.uint8)
        found = room[: self.like.nbytes].view(self.like.dtype).view(self.like.shape)
        data = room[: self.like.nbytes].numpy()
        self.file.read_into(self.start, data)
        if self.sha256 and hashlib.sha256(data.data).hexdigest() != self.sha256:
            raise CheckpointError(f"{self.path} is damaged: the checksum of {self.name} is not that in its manifest")
        return found

    def digest(self) -> str:
        """The sha256 of its bytes, in hexadecimal."""
        if self.sha256:
            return self.sha256
        digest, end = hashlib.sha256(), self.start + self.like.nbytes
        for start in range(self.start, end, PIECE):
            digest.update(part(self.file, start, min(PIECE, end - start)))
        return digest.hexdigest()


def stored_tensors(checkpoint: Path, *, checked: bool = True) -> dict[str, StoredTensor]:
    """The tensors at a place that `resolve_checkpoint` found, by our names. Raises CheckpointError.

    A file without checksums of all tensors is `checked` as a whole.
    """
    if pretrained.found(checkpoint):
        found: dict[str, StoredTensor] = {}
        for path in pretrained.files(checkpoint):
            found |= {name.removeprefix(pretrained.PREFIX): t for name, t in in_file(path, None, {}).items()}
        return found
    entry = store.entry_of(checkpoint, pretrained.WEIGHTS)
    if checked and not entry.tensors:
        store.verify(checkpoint)
    found = in_file(checkpoint / pretrained.WEIGHTS, entry.size, entry.tensors)
    if checked and entry.tensors and any(tensor.sha256 is None for tensor in found.values()):
        store.verify(checkpoint)
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
        listed = list(located(partial(part, file), size))
    except (
        ValueError,
        CheckpointError,
        RuntimeError,
        OverflowError,
    ) as error:  # RuntimeError: see `store.read_tensors`
        why = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({why}): copy or download it again") from error
    return {
        legacy.tensor_name(name): StoredTensor(name, like, file, path, size, start, sums.get(name))
        for name, like, start in listed
    }


def part(file: PositionReader, start: int, size: int) -> bytes:
    """Some bytes of a file."""
    data = np.empty(size, np.uint8)
    file.read_into(start, data)
    return data.tobytes()
