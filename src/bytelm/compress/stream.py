"""Lossless compression with a model: the same loop encodes and decodes, so that both compute the same.

    lanes        the file in one to LANES parts of one size, read side by side
    windows      a lane is reset after every half of the context, and reads the half before it
    a step       logits of every lane → frequencies → a byte each, coded or decoded → read

Bytes that are known are read in chunks: all when compressing, and when decompressing those of the half before. They are
coded in the order of the steps all the same, so that a file does not depend on it.

With a memory that learns the file as it is coded (`bytelm.online`) there is one lane, and bits are coded in place of
bytes: all that the memory adds is of integers.

What a model gives must be bitwise identical on both sides. It is on one machine with one version (an invariant of the
decoders); the header says which they were, and has a checksum of the content.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.compress.coder import Decoder, Encoder, frequencies
from bytelm.decoding import open_decoder, why_plain
from bytelm.errors import DataError, UsageError
from bytelm.interfaces.decoder import Ints, Reals
from bytelm.interfaces.model import ByteModel
from bytelm.machine import processor
from bytelm.native.library import library
from bytelm.online import coding
from bytelm.online.memory import Memory, among_bytes
from bytelm.online.settings import LARGEST, SMALLEST
from bytelm.units import BOS, BYTES

MAGIC, VERSION = b"BLMC", 2
HEADER = struct.Struct("<4sB8s4sIBQI")  # magic, version, model, machine, context, lanes, size, checksum
ONLINE = struct.Struct("<BQ8s")  # follows with a memory: whether it was primed, its bytes, and what it was
LANES = 8  # of a file that is long enough to be cut
WORTH = 16  # contexts that a lane must have to be worth its beginning, of which nothing is known
LONGEST = 1 << 24  # bytes of context
MOST = 1 << 27  # largest compression ratio: the most certain byte costs 1e-7 bits

Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class Header:
    """What stands before the coded bits."""

    version: int
    context: int
    lanes: int
    size: int
    machine: bytes
    checksum: int
    primed: bool = False
    memory: int = 0
    """Bytes of the memory's setting; 0 without one."""
    identity: bytes = b""
    """Of the memory before it learned the file."""

    @property
    def online(self) -> Literal["cold", "primed"] | None:
        """Which memory it needs, as `--online` names it."""
        return ("primed" if self.primed else "cold") if self.memory else None

    @property
    def length(self) -> int:
        """Bytes of the header itself."""
        return HEADER.size + (ONLINE.size if self.memory else 0)


def compress(
    model: ByteModel, data: bytes, context: int, progress: Progress = None, memory: Memory | None = None
) -> bytes:
    """A header and the bits that `model`, and a `memory` that learns `data`, need for it, `context` at a time.

    Raises UsageError for a token model or on another device than the CPU, or a context below 2.
    """
    if not 2 <= context < LONGEST:
        raise UsageError(f"context {context}: must be from 2 to {LONGEST - 1}")
    lanes = 1 if memory is not None else max(1, min(LANES, len(data) // (WORTH * context)))
    array, encoder, bits = np.frombuffer(data, np.uint8), Encoder(), coding.Encoder()
    online = b"" if memory is None else ONLINE.pack(memory.read_bytes > 0, memory.settings.memory, memory.identity())

    def code(logits: Reals, places: Ints) -> None:
        if memory is None:
            encoder.put(frequencies(logits), array[places])
        else:
            bits.put(memory, array[places], among_bytes(logits))

    walk(model, array, context, lanes, code, progress, known=True)
    version = 1 if memory is None else VERSION  # what an older bytelm reads as well
    sizes = (context, lanes, len(data), zlib.crc32(data))
    header = HEADER.pack(MAGIC, version, identity(model), surroundings(model), *sizes) + online
    return header + (encoder.end() if memory is None else bits.end())


def decompress(model: ByteModel, packed: bytes, progress: Progress = None, memory: Memory | None = None) -> bytes:
    """What was given to `compress`, `memory` being as it was then.

    Raises DataError for anything else, and where model, memory or machine are others.
    """
    header = opened(model, packed)
    check_memory(header, memory)
    array, coded = np.zeros(header.size, np.uint8), packed[header.length :]
    decoder = Decoder(coded) if memory is None else coding.Decoder(coded)

    def decode(logits: Reals, places: Ints) -> None:
        if isinstance(decoder, Decoder):
            for frequency, place in zip(frequencies(logits), places.tolist(), strict=True):
                array[place] = decoder.get(frequency)
        elif memory is not None:
            for line, place in zip(among_bytes(logits), places.tolist(), strict=True):
                array[place] = decoder.get(memory, line)

    walk(model, array, header.context, header.lanes, decode, progress, known=False)
    data = array.tobytes()
    if zlib.crc32(data) != header.checksum:
        elsewhere = "another machine or version of bytelm wrote it, and rounds differently: decompress it there"
        reason = "it is damaged: get a complete copy" if header.machine == surroundings(model) else elsewhere
        raise DataError(f"decompression does not restore the input: {reason}")
    return data


def check_memory(header: Header, memory: Memory | None) -> None:
    """Raises DataError unless a file was coded with just this memory, or with none."""
    if memory is None:
        if header.memory:
            raise DataError("it was compressed with an online memory: give the same one to decompress it")
    elif not header.memory:
        raise DataError("it was compressed without an online memory: leave the memory out")
    elif memory.identity() != header.identity:
        whose = "primed by other bytes, or not at all" if header.primed else "of other settings, or had read something"
        raise DataError(f"the online memory that it was compressed with was another: this one is {whose}")


def opened(model: ByteModel, packed: bytes) -> Header:
    """The header of what `compress` wrote. Raises DataError where it is not for this model."""
    if len(packed) <= HEADER.size or packed[:4] != MAGIC:
        raise DataError("it is not a file that `bytelm compress` wrote")
    _, version, whose, machine, context, lanes, size, checksum = HEADER.unpack(packed[: HEADER.size])
    if version > VERSION:
        raise DataError(f"a newer bytelm wrote it (format {version}, this one reads {VERSION}): upgrade bytelm")
    if whose != identity(model):
        raise DataError("another model wrote it: name the run that compressed it, with the same --weights")
    found = Header(version, context, lanes, size, machine, checksum)
    whole = 2 <= context < LONGEST and 1 <= lanes <= LANES and size <= MOST * len(packed)
    if whole and version == VERSION:
        whole = len(packed) > HEADER.size + ONLINE.size
        if whole:
            primed, memory, of_memory = ONLINE.unpack(packed[HEADER.size : HEADER.size + ONLINE.size])
            found = replace(found, primed=bool(primed), memory=memory, identity=of_memory)
            whole = SMALLEST <= memory <= LARGEST and lanes == 1
    if not whole:
        raise DataError("its header is damaged: get a complete copy")
    return found


def identity(model: ByteModel) -> bytes:
    """Eight bytes that tell models apart: a hash of every weight and of how patches are cut."""
    digest = hashlib.sha256(repr(model).encode())
    if model.content is not None:
        return hashlib.sha256(digest.digest() + model.content()).digest()[:8]
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:8]


def surroundings(model: ByteModel) -> bytes:
    """Four bytes that tell apart where a model is read: kernels as compiled for a processor, or torch and threads."""
    kernels = None if why_plain(model) else library("kernels")
    by_torch = f"{torch.__version__} {processor()} {torch.get_num_threads()} {model.device}"
    return hashlib.sha256((Path(kernels._name).stem if kernels else by_torch).encode()).digest()[:4]


def walk(
    model: ByteModel,
    data: NDArray[np.uint8],
    context: int,
    lanes: int,
    visit: Callable[[Reals, Ints], None],
    progress: Progress,
    *,
    known: bool,
) -> None:
    """Tell `visit` the logits `[n, BYTES]` of bytes and their places `[n]`: each byte once, a step's lanes in turn.

    Unless all of `data` is `known`, a byte is read only after `visit` was given its place.
    """
    if model.tokens is not None:
        raise UsageError("this model reads tokens: compress with a model of bytes")
    if model.device.type != "cpu":  # where sums of one program differ from run to run, and what it writes is lost
        raise UsageError(
            f'the model is on {model.device}, which is not bitwise reproducible: load it with device="cpu"'
        )
    each, half = -(-len(data) // lanes), context // 2
    starts = np.arange(lanes) * each
    sizes = np.clip(len(data) - starts, 0, each)
    reader = open_decoder(model, rows=lanes, capacity=1 + half + half)
    known = known and reader.repeats  # or other chunks, in which bytes are decoded, would have other logits
    for begin in range(0, each, half):
        rows, end = np.flatnonzero(sizes > begin), min(begin + half, each)
        reader.rollback(rows, np.zeros(len(rows), np.int64))
        at = first = max(0, begin - half)  # of a lane, the byte whose logits come next
        while at < end:
            upto = min(at + reader.chunk, end if known else max(begin, at) + 1)
            rows = rows[sizes[rows] >= at]
            steps = np.arange(max(at, begin), upto)
            ids = before(data, starts[rows], np.arange(at, upto), first)
            wanted = np.tile(np.arange(at, upto) >= begin, len(rows))
            logits = reader.read(rows.repeat(upto - at), ids.ravel(), wanted)
            logits = logits.reshape(len(rows), len(steps), reader.vocabulary)
            there = sizes[rows] > steps[:, None]
            places = (starts[rows] + steps[:, None])[there]
            visit(logits[..., :BYTES].swapaxes(0, 1)[there], places)
            if progress and len(places):
                progress(len(places))
            at = upto


def before(data: NDArray[np.uint8], starts: Ints, bytes: Ints, first: int) -> Ints:
    """The id before each of some bytes of each lane `[rows, bytes]`: BOS before the `first`."""
    # A lane that ends before the others goes on with what is there, for which nobody asks.
    ids = data[np.clip(starts[:, None] + bytes - 1, 0, len(data) - 1)].astype(np.int64)
    ids[:, bytes <= first] = BOS
    return ids
