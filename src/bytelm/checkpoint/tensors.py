"""safetensors files of a checkpoint: written piece by piece, and read in one pass that checks what it takes.

    8 bytes     length of the header
    header      JSON: name → dtype, shape, [first byte, byte after the last]; spaces up to a multiple of 8
    data        the tensors one after another

The library reads a file into memory and copies the tensors out of it, which takes twice their size, or maps it, and
then a file that was checked may change before it is used. So the few lines that read are here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from bytelm.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED = {name: dtype for dtype, name in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header: the bound of the library, which would read no longer one
NARROW = (torch.float16, torch.bfloat16)


def header(tensors: Mapping[str, Tensor], said: Mapping[str, str] | None = None) -> bytes:
    """The head of a file of these tensors, its length in front, with what is `said` of them beside.

    Raises CheckpointError for a dtype it cannot hold.
    """
    entries: dict[str, Any] = {"__metadata__": dict(said)} if said else {}
    start = 0
    for name in order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"cannot save tensor {name!r}: {tensor.dtype}; known: {', '.join(map(str, DTYPES))}")
        end = start + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names, widest elements first, so that every tensor starts at a multiple of its element's size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def pieces(head: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A file piece by piece: no more than one tensor is copied at a time."""
    yield head
    for name in order(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


Keep = Callable[[str, Tensor], Tensor]
"""What to hold of a tensor, by its name, before the next one is read."""


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor


def widened(name: str, tensor: Tensor) -> Tensor:
    """Floats of 16 bits as float32, which loses nothing."""
    return tensor.float() if tensor.dtype in NARROW else tensor


def read(stream: BufferedReader, size: int, keep: Keep) -> tuple[dict[str, Tensor], str]:
    """What is to `keep` of the tensors of a file of `size` bytes, and the file's sha256, in one pass over it.

    Raises ValueError for bytes that are no such file; the caller verifies the checksum before using anything.
    """
    digest = hashlib.sha256()

    def take(count: int) -> bytes:
        data = stream.read(count)
        if len(data) != count:
            raise ValueError("it ends early")
        digest.update(data)
        return data

    length = int.from_bytes(take(min(size, 8)), "little")
    if size < 8 or length > min(size - 8, LONGEST):
        raise ValueError(f"its header would be {length} bytes long")
    found: dict[str, Tensor] = {}
    for name, dtype, shape in entries(take(length), size - 8 - length):
        tensor = torch.empty(shape, dtype=dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        if data.nbytes and stream.readinto(data) != data.nbytes:
            raise ValueError("it ends early")
        digest.update(data)
        found[name] = keep(name, tensor)
    return found, digest.hexdigest()


def entries(text: bytes, size: int) -> list[tuple[str, torch.dtype, list[int]]]:
    """Name, dtype and shape of each tensor in the order of its data, which fill `size` bytes. Raises ValueError."""
    try:
        table = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(table, dict):
        raise ValueError("its header is no table")
    table.pop("__metadata__", None)
    found: list[tuple[int, int, str, torch.dtype, list[int]]] = []
    for name, entry in table.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(first), int(end)]} if kind in NAMED:
                whole = all(type(side) is int and 0 <= side < 1 << 63 for side in shape)
                if not whole or end - first != math.prod(shape) * NAMED[kind].itemsize:
                    raise ValueError(f"{name!r} has shape {shape} in {end - first} bytes")
                found.append((first, end, name, NAMED[kind], shape))
            case _:
                raise ValueError(f"{name!r} is not described as a tensor")
    found.sort(key=lambda entry: entry[:2])
    ends = [0, *(end for _, end, *_ in found)]
    if ends[-1] != size or [first for first, *_ in found] != ends[:-1]:
        raise ValueError("its tensors overlap, or do not fill it")
    return [(name, dtype, shape) for _, _, name, dtype, shape in found]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; of two of a name the last would win unseen."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("its header names something twice")
    return dict(pairs)
