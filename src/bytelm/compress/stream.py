"""Lossless compression with a model: the same loop encodes and decodes, so that both compute the same.

    lanes        the file in one to LANES parts of one size, read side by side
    windows      a lane is reset after every half of the context, and reads the half before it
    a step       logits of every lane → frequencies → a byte each, coded or decoded → read

Bytes that are known are read in chunks: all when compressing, and when decompressing those of the half before. They are
coded in the order of the steps all the same, so that a file does not depend on it.

What a model gives must be bitwise identical on both sides. It is on one machine with one version (an invariant of the
decoders); the header says which they were, and has a checksum of the content.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

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
from bytelm.units import BOS, BYTES

MAGIC, VERSION = b"BLMC", 1
HEADER = struct.Struct("<4sB8s4sIBQI")  # magic, version, model, machine, context, lanes, size, checksum
LANES = 8  # of a file that is long enough to be cut
WORTH = 16  # contexts that a lane must have to be worth its beginning, of which nothing is known
LONGEST = 1 << 24  # bytes of context
MOST = 1 << 27  # largest compression ratio: the most certain byte costs 1e-7 bits

Progress = Callable[[int], None] | None


def compress(model: ByteModel, data: bytes, context: int, progress: Progress = None) -> bytes:
    """A header and the bits that `model` needs for `data`, read `context` bytes at a time.

    Raises UsageError for a token model or on another device than the CPU, or a context below 2.
    """
    if not 2 <= context < LONGEST:
        raise UsageError(f"context {context}: must be from 2 to {LONGEST - 1}")
    lanes = max(1, min(LANES, len(data) // (WORTH * context)))
    array, encoder = np.frombuffer(data, np.uint8), Encoder()

    def code(logits: Reals, places: Ints) -> None:
        encoder.put(frequencies(logits), array[places])

    walk(model, array, context, lanes, code, progress, known=True)
    sizes = (context, lanes, len(data), zlib.crc32(data))
    return HEADER.pack(MAGIC, VERSION, identity(model), surroundings(model), *sizes) + encoder.end()


def decompress(model: ByteModel, packed: bytes, progress: Progress = None) -> bytes:
    """What was given to `compress`. Raises DataError for anything else, and where model or machine are others."""
    size, context, lanes = opened(model, packed)
    decoder = Decoder(packed[HEADER.size :])
    array = np.zeros(size, np.uint8)

    def decode(logits: Reals, places: Ints) -> None:
        for frequency, place in zip(frequencies(logits), places.tolist(), strict=True):
            array[place] = decoder.get(frequency)

    walk(model, array, context, lanes, decode, progress, known=False)
    data, (*_, machine, _, _, _, checksum) = array.tobytes(), HEADER.unpack(packed[: HEADER.size])
    if zlib.crc32(data) != checksum:
        elsewhere = "another machine or version of bytelm wrote it, and rounds differently: decompress it there"
        reason = "it is damaged: get a complete copy" if machine == surroundings(model) else elsewhere
        raise DataError(f"decompression does not restore the input: {reason}")
    return data


def opened(model: ByteModel, packed: bytes) -> tuple[int, int, int]:
    """Size, context and lanes of what `compress` wrote. Raises DataError where it is not for this model."""
    if len(packed) <= HEADER.size or packed[:4] != MAGIC:
        raise DataError("it is not a file that `bytelm compress` wrote")
    _, version, whose, _, context, lanes, size, _ = HEADER.unpack(packed[: HEADER.size])
    if version > VERSION:
        raise DataError(f"a newer bytelm wrote it (format {version}, this one reads {VERSION}): upgrade bytelm")
    if whose != identity(model):
        raise DataError("another model wrote it: name the run that compressed it, with the same --weights")
    if not (2 <= context < LONGEST and 1 <= lanes <= LANES and size <= MOST * len(packed)):
        raise DataError("its header is damaged: get a complete copy")
    return size, context, lanes


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
