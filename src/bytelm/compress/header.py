"""What stands before the coded bits: what decompression needs to know, and what it must have."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import torch

from bytelm.errors import ConfigError, DataError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.online.memory import Memory
from bytelm.online.settings import TEXT, Settings

MAGIC, VERSION = b"BLMC", 7
SEAL = struct.Struct("<4sBQI")  # magic, version, the bytes that follow, their CRC-32
HEADER = struct.Struct("<B8sIIBQI")  # kind, model, probe, context, streams, size, checksum
ONLINE = struct.Struct("<Q8sH")  # follows with a memory: its bytes, what it was, the length of its predictors' names
LENGTH = struct.Struct("<Q")  # follow with several memories: coded bytes of each stream but the last
LONGEST = 1 << 24  # bytes of context
MOST_STREAMS = 64
MOST = 1 << 27  # largest compression ratio: the most certain byte costs 1e-7 bits

Kind = Literal["cold", "primed"]
KINDS: tuple[Kind | None, ...] = (None, "cold", "primed")
WHOLE = "get a complete copy"


@dataclass(frozen=True)
class Header:
    """Of one compressed file."""

    model: bytes
    """`identity` of the model."""
    probe: int
    """A checksum of what the model predicts of fixed bytes: machines that round otherwise have another."""
    context: int
    streams: int
    size: int
    """Bytes that were compressed."""
    checksum: int
    """CRC-32 of them."""
    online: Kind | None = None
    """Which memory it needs, as `--online` names it."""
    settings: Settings | None = None
    """The memory's; None without one."""
    identity: bytes = bytes(8)
    """Of the memory before it learned the file."""

    def pack(self) -> bytes:
        """The header as bytes."""
        kind, whose = KINDS.index(self.online), (self.model, self.probe)
        fixed = HEADER.pack(kind, *whose, self.context, self.streams, self.size, self.checksum)
        if self.settings is None:
            return fixed
        usual = self.settings.predictors == TEXT
        names = b"" if usual else ",".join(self.settings.predictors).encode()
        return fixed + ONLINE.pack(self.settings.memory, self.identity, len(names)) + names


def opened(model: ByteModel, packed: bytes) -> tuple[Header, list[bytes]]:
    """The header of what `compress` wrote, and the coded bytes: of all streams, or of each if there are memories.

    Raises DataError where it is not for this model.
    """
    body = unsealed(packed)
    kind, *rest = HEADER.unpack(body[: HEADER.size].ljust(HEADER.size, b"\0"))
    found, coded = Header(*rest), body[HEADER.size :]
    if found.model != identity(model):
        raise DataError("another model wrote it: name the run that compressed it, with the same --weights and --tables")
    whole = kind < len(KINDS) and 2 <= found.context < LONGEST and 1 <= found.streams <= MOST_STREAMS
    if whole and kind:
        memory, which, length = ONLINE.unpack(coded[: ONLINE.size].ljust(ONLINE.size, b"\0"))
        names, coded = coded[ONLINE.size :][:length], coded[ONLINE.size + length :]
        found = replace(found, online=KINDS[kind], settings=_settings(names, memory), identity=which)
        whole = len(coded) > 0 and found.settings is not None
    if not whole or not 0 < found.size <= MOST * len(packed):
        raise DataError(f"its header is damaged: {WHOLE}")
    return found, _parts(found, coded)


def _settings(names: bytes, memory: int) -> Settings | None:
    """A memory's, by the names of its predictors, nothing for the usual ones; None if there are none such."""
    try:
        return Settings(tuple(names.decode().split(",")) if names else TEXT, memory)
    except (ConfigError, UsageError, UnicodeDecodeError):
        return None


def joined(header: Header, parts: list[bytes]) -> bytes:
    """A whole file, of the coded bytes of streams."""
    return sealed(header.pack() + b"".join(LENGTH.pack(len(part)) for part in parts[:-1]) + b"".join(parts))


def sealed(body: bytes) -> bytes:
    """A file of a header and what follows it: what is cut off or damaged is noticed before anything is decoded."""
    return SEAL.pack(MAGIC, VERSION, len(body), zlib.crc32(body)) + body


def unsealed(packed: bytes) -> bytes:
    """What was given to `sealed`. Raises DataError where it is not whole, or of another version."""
    if len(packed) <= len(MAGIC) or packed[: len(MAGIC)] != MAGIC:
        raise DataError("it is not a file that `bytelm compress` wrote")
    version = packed[len(MAGIC)]
    if version != VERSION:
        which = "a newer bytelm wrote it" if version > VERSION else "an older bytelm wrote it"
        raise DataError(f"{which} (format {version}, this one reads {VERSION}): decompress it with that version")
    *_, size, checksum = SEAL.unpack(packed[: SEAL.size].ljust(SEAL.size, b"\xff"))  # of a shorter one no size is met
    body = packed[SEAL.size :]
    if len(packed) < SEAL.size + size:
        of = f" of {SEAL.size + size:,}" if len(packed) >= SEAL.size else ""
        raise DataError(f"it is truncated, {len(packed):,}{of} bytes: {WHOLE}")
    if len(body) != size or zlib.crc32(body) != checksum:
        raise DataError(f"it is damaged: {WHOLE}")
    return body


def _parts(header: Header, coded: bytes) -> list[bytes]:
    """The coded bytes of each stream. Raises DataError for lengths that cannot be."""
    if not header.online:
        return [coded]
    table = LENGTH.size * (header.streams - 1)
    lengths = [size for (size,) in LENGTH.iter_unpack(coded[:table])] if table <= len(coded) else [len(coded) + 1]
    if table + sum(lengths) > len(coded):
        raise DataError(f"its header is damaged: {WHOLE}")
    found, at = list[bytes](), table
    for size in (*lengths, len(coded)):
        found.append(coded[at : at + size])
        at += size
    return found


def check_memory(header: Header, memory: Memory | None) -> None:
    """Raises DataError unless a file was coded with just this memory, or with none."""
    if memory is None:
        if header.online:
            raise DataError("it was compressed with an online memory: give the same one to decompress it")
    elif not header.online:
        raise DataError("it was compressed without an online memory: leave the memory out")
    elif (primed := header.online == "primed") and header.settings and memory.settings.memory != header.settings.memory:
        size, here = header.settings.memory, memory.settings.memory
        raise DataError(
            f"it was compressed with an online memory of {size:,} bytes, and this one has {here:,}: make that one "
            f"again, with `bytelm prime --memory {size / 2**20}` of the run"
        )
    elif memory.identity() != header.identity:
        whose = "primed by other bytes, or not at all" if primed else "of other settings, or had read something"
        raise DataError(f"the online memory that it was compressed with was another: this one is {whose}")


def identity(model: ByteModel) -> bytes:
    """Eight bytes that tell models apart: a hash of every weight and of how patches are cut."""
    digest = hashlib.sha256(repr(model).encode())
    if model.content is not None:
        return hashlib.sha256(digest.digest() + model.content()).digest()[:8]
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:8]
