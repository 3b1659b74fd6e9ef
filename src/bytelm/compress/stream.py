"""Lossless compression with a model: the same loop encodes and decodes, so that both compute the same.

    compress(model, data, context) -> packed         in memory
    decompress(model, packed) -> data
    encode(model, source, ...), decode(model, packed, target, ...)     files of any size, which may be interrupted

How a file is read is said in `windows`, what codes it in `sides`, and what stands before it in `header`. With a memory
that learns the file as it is coded (`bytelm.online`) bits are coded in place of bytes: all that it adds is of integers.

What a model predicts must be bitwise identical on both sides. So that nobody waits for hours to learn that it is not,
the header has a checksum of what it predicts of fixed bytes, and the stream one of all that was predicted, where a
window ends in which CHECK bytes more are done; at the end there is one of the content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bytelm.compress.header import LONGEST, MOST_STREAMS, Header, check_memory, identity, joined, opened, sealed
from bytelm.compress.resume import Resume
from bytelm.compress.sides import OTHERWISE, MemoryReader, MemoryWriter, ModelReader, ModelWriter, Side
from bytelm.compress.windows import Held, Progress, Readable, Source, Streams, Target, Window, checksum, walk
from bytelm.decoding import why_plain
from bytelm.errors import DataError, ResourceError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.native.library import arithmetic
from bytelm.online.memory import Memory

STREAMS = 8  # of a file that is long enough to be cut, without a memory
WORTH = 16  # contexts that a stream must have to be worth its beginning, of which nothing is known
CHECK = 1 << 17  # bytes between two checks, of two bytes each
PROBE = np.random.default_rng(0).integers(0, 256, 64, np.uint8)


def compress(
    model: ByteModel,
    data: bytes,
    context: int,
    progress: Progress = None,
    memory: Memory | None = None,
    streams: int | None = None,
) -> bytes:
    """See `encode`, which it is for bytes in memory."""
    source = Held(np.frombuffer(data, np.uint8))
    return encode(model, source, len(data), context, progress, memory, streams)


def decompress(model: ByteModel, packed: bytes, progress: Progress = None, memory: Memory | None = None) -> bytes:
    """See `decode`, which it is for bytes in memory. Raises ResourceError where there is no room for them."""
    header, _ = opened(model, packed)
    try:
        target = Held(np.zeros(header.size, np.uint8))
    except MemoryError as error:
        raise ResourceError(
            f"no room in memory for the {header.size} bytes that its header names: get a complete copy if it is "
            "damaged, else restore it to a file with --out"
        ) from error
    decode(model, packed, target, progress, memory)
    return target.data.tobytes()


def encode(
    model: ByteModel,
    source: Source,
    size: int,
    context: int,
    progress: Progress = None,
    memory: Memory | None = None,
    streams: int | None = None,
    resume: Resume | None = None,
) -> bytes:
    """A header and the bits that `model`, and a `memory` that learns, need for `size` bytes, `context` at a time.

    `streams`: parts of the file that are read in parallel, by default STREAMS of a long one; 1 with a memory, as each
    has a memory of its own, which knows nothing of the others. Raises UsageError for a token model or on another
    device than the CPU, a context below 2, or streams that cannot be; Stopped where `resume` asks for it.
    """
    if not 2 <= context < LONGEST:
        raise UsageError(f"context {context}: must be from 2 to {LONGEST - 1}")
    if size < 1:
        raise UsageError("0 bytes: there is nothing to compress")
    if streams is None:
        streams = 1 if memory is not None else max(1, min(STREAMS, size // (WORTH * context)))
    if not 1 <= streams <= min(MOST_STREAMS, size):
        raise UsageError(f"streams {streams}: must be from 1 to {min(MOST_STREAMS, size)} for {size} bytes")
    header = Header(identity(model), probe(model), context, streams, size, checksum(source, size))
    if memory is not None:
        kind = "primed" if memory.read_bytes else "cold"
        header = replace(header, online=kind, settings=memory.settings, identity=memory.identity())
    side = ModelWriter() if memory is None else MemoryWriter(memory, streams)
    for _ in run(model, source, header, side, progress, resume, sealed(header.pack()), source.check, known=True):
        pass
    source.check()
    return joined(header, side.end())


def decode(
    model: ByteModel,
    packed: bytes,
    target: Target,
    progress: Progress = None,
    memory: Memory | None = None,
    resume: Resume | None = None,
) -> None:
    """Write what was given to `encode`, `memory` being as it was then, to a target that has room for it.

    Raises DataError for anything else, and where model, memory or machine are others; Stopped as `encode`.
    """
    header, parts = opened(model, packed)
    check_memory(header, memory)
    if header.probe != probe(model):
        here = None if why_plain(model) else arithmetic()
        raise DataError(
            "this machine rounds the model's predictions otherwise than the one that compressed it "
            f"(kernels here: {here or 'none, torch computes'}), or another version of bytelm did: decompress "
            "it with that version, on a processor of the same kind (docs/compression.md)"
        )
    side = ModelReader(parts[0]) if memory is None else MemoryReader(memory, parts)
    streams = Streams(header.size, header.streams)
    for window in run(model, target, header, side, progress, resume, packed, target.sync, known=False):
        for stream, (start, size) in enumerate(zip(streams.starts.tolist(), streams.sizes.tolist(), strict=True)):
            found = window.block[stream, window.begin - window.first : max(0, size - window.first)]
            if len(found):
                target.write(start + window.begin, found)
    if checksum(target, header.size) != header.checksum:
        raise DataError(OTHERWISE)


def run(
    model: ByteModel,
    source: Readable,
    header: Header,
    side: Side,
    progress: Progress,
    resume: Resume | None,
    work: bytes,
    settle: Callable[[], None],
    *,
    known: bool,
) -> Iterator[Window]:
    """Let a side code all windows, from where it was interrupted on; what it found is written when the next begins.

    `work`: what tells it from other work. `settle`: see `Resume.at`.
    """
    streams, since = Streams(header.size, header.streams), 0
    if resume is not None and (found := resume.begin(hashlib.sha256(work).hexdigest())) is not None:
        since, state = found
        side.restore(state)
        del found, state  # memories, once more
    done = streams.before(since)
    if progress and done:
        progress(done)
    for window in walk(model, source, streams, header.context, side, since, progress, known=known):
        before, done = done, streams.before(window.end)
        if before // CHECK < done // CHECK:
            side.check()
        yield window
        if resume is not None and window.end < streams.each:
            resume.at(window.end, done, side.state, settle)


def probe(model: ByteModel) -> int:
    """A checksum of what a model predicts of fixed bytes, as it is coded."""
    side = ModelWriter()
    for _ in walk(model, Held(PROBE), Streams(len(PROBE), 1), len(PROBE), side, known=True):
        pass
    return side.sum
