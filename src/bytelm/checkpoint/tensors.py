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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
PIECE = 1 << 20  # bytes that are converted, hashed and written together: fewer cost switches, more cost page faults
WEIGHT, SCALE = ".weight", ".scale"  # a weight in int8 and the scales of its rows


@dataclass(frozen=True)
class Streamed:
    """A tensor that is read piece by piece whenever it is wanted, and never as a whole."""

    like: Tensor
    """On the meta device, with its shape and dtype."""
    pieces: Callable[[], Iterable[Tensor]]
    """Its parts along the first axis in order, on the CPU and of its dtype."""


Stored = Mapping[str, Tensor | Streamed]
"""Tensors to be written, by name."""


def like(tensor: Tensor | Streamed) -> Tensor:
    """A tensor of the same shape and dtype."""
    return tensor.like if isinstance(tensor, Streamed) else tensor


def parts(tensor: Tensor | Streamed) -> Iterable[Tensor]:
    """A tensor in pieces along its first axis, of at most `PIECE` bytes where rows are not longer."""
    if isinstance(tensor, Streamed):
        return tensor.pieces()
    return tensor.split(rows_of(tensor)) if tensor.ndim else (tensor,)


def rows_of(tensor: Tensor) -> int:
    """How many rows make a piece."""
    return max(1, PIECE // max(1, tensor.nbytes // max(1, len(tensor))))


def header(tensors: Stored, said: Mapping[str, str] | None = None) -> bytes:
    """The head of a file of these tensors, its length in front, with what is `said` of them beside.

    Raises CheckpointError for a dtype it cannot hold.
    """
    entries: dict[str, Any] = {"__metadata__": dict(said)} if said else {}
    start = 0
    for name in order(tensors):
        tensor = like(tensors[name])
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"cannot save tensor {name!r}: {tensor.dtype}; known: {', '.join(map(str, DTYPES))}")
        end = start + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def order(tensors: Stored) -> list[str]:
    """Names, widest elements first, so that every tensor starts at a multiple of its element's size."""
    return sorted(tensors, key=lambda name: (-like(tensors[name]).element_size(), name))


Piece = tuple[str, bytes | memoryview]
"""Of the bytes of a file, and the name of the tensor that they are of; "": of none."""


def pieces(head: bytes, tensors: Stored) -> Iterator[Piece]:
    """A file piece by piece, at least one of each tensor; no more than a piece is copied at a time."""
    yield "", head
    for name in order(tensors):
        yield name, b""
        size = 0
        for part in parts(tensors[name]):
            data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            size += len(data)
            yield name, data
        if size != like(tensors[name]).nbytes:
            raise ValueError(f"{name!r} is {size} bytes long, not {like(tensors[name]).nbytes}")


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
    listed = entries(take(length), size - 8 - length)
    partner = {name: other for pair in scales(listed).items() for name, other in (pair, pair[::-1])}
    waiting: dict[str, Tensor] = {}
    for name, dtype, shape in listed:
        tensor = torch.empty(shape, dtype=dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        if data.nbytes and stream.readinto(data) != data.nbytes:
            raise ValueError("it ends early")
        digest.update(data)
        if name in partner:
            waiting[name] = tensor
            if partner[name] not in waiting:
                continue
            name = name if name.endswith(WEIGHT) else partner[name]
            tensor = restored(waiting.pop(name), waiting.pop(partner[name]))
        found[name] = keep(name, tensor)
    return found, digest.hexdigest()


Listed = tuple[str, torch.dtype, list[int]]
"""Name, dtype and shape of a tensor in a file."""


def scales(listed: Iterable[Listed]) -> dict[str, str]:
    """The name of each weight that is in int8, `X.weight` `[rows, …]`, and that of its scales, `X.scale` `[rows]`."""
    found = {name: (dtype, shape) for name, dtype, shape in listed}
    pairs = {name: scale_of(name) for name, (dtype, shape) in found.items() if dtype == torch.int8 and len(shape) == 2}
    return {
        name: scale
        for name, scale in pairs.items()
        if name.endswith(WEIGHT) and found.get(scale) == (torch.float32, found[name][1][:1])
    }


def scale_of(name: str) -> str:
    """The name of the scales of a weight."""
    return name.removesuffix(WEIGHT) + SCALE


def restored(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight `[rows, in]` in int8 with the scale of each row, in float32."""
    found = torch.empty(weight.shape)
    rows = rows_of(found)
    for out, whole, by in zip(found.split(rows), weight.split(rows), scale.split(rows), strict=True):
        torch.mul(whole, by[:, None], out=out)
    return found


def located(
    read: Callable[[int, int], bytes], size: int, known: Mapping[str, torch.dtype] = NAMED
) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor on the meta device and first byte of each tensor of a file; `read(start, count)` gives bytes of it.

    Raises ValueError for what is no such file, and what torch raises for a shape that it refuses.
    """
    length = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or length > min(size - 8, LONGEST):
        raise ValueError(f"its header would be {length} bytes long")
    at = 8 + length
    for name, dtype, shape in entries(read(8, length), size - at, known):
        like = torch.empty(shape, dtype=dtype, device="meta")
        yield name, like, at
        at += like.nbytes


def entries(text: bytes, size: int, known: Mapping[str, torch.dtype] = NAMED) -> list[Listed]:
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
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(first), int(end)]} if kind in known:
                whole = all(type(side) is int and 0 <= side < 1 << 63 for side in shape)
                if not whole or end - first != math.prod(shape) * known[kind].itemsize:
                    raise ValueError(f"{name!r} has shape {shape} in {end - first} bytes")
                found.append((first, end, name, known[kind], shape))
            case {"dtype": str(kind)} if kind not in known:
                raise ValueError(f"{name!r} is {kind[:20]!r}; known: {', '.join(known)}")
            case _:
                raise ValueError(f"{name!r} is not described as a tensor")
    found.sort(key=lambda entry: entry[:2])
    ends = [0, *(end for _, end, *_ in found)]
    if ends[-1] != size:
        raise ValueError(f"its tensors take {ends[-1]} bytes, and it has {size} of them")
    if [first for first, *_ in found] != ends[:-1]:
        raise ValueError("its tensors overlap, or leave gaps")
    return [(name, dtype, shape) for _, _, name, dtype, shape in found]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; of two of a name the last would win unseen."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("its header names something twice")
    return dict(pairs)
