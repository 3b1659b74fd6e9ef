"""Continuous batching: requests enter at any step, are prefilled in chunks beside decoding ones, and retire.

join(request) → ticket      admit a request to a free row
step() → pieces             prefill a chunk of each prompt, decode a byte (or a draft) of every other row
leave(ticket)               cancel; a row is also freed after its last piece
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from bytelm.data.bpe import Bpe
from bytelm.decoding import Decoder, Quantization, open_decoder
from bytelm.device import fitting
from bytelm.errors import ResourceError, UsageError
from bytelm.generate import stop as stopping
from bytelm.generate.sampling import DEFAULT, Ints, Reals, Sampling, row_key, written
from bytelm.generate.speculate import Speculation
from bytelm.generate.utf8 import Utf8State
from bytelm.interfaces.model import ByteModel
from bytelm.threads import all_or_one
from bytelm.units import BOS, EOS

Reason = Literal["eos", "stop", "length"]

ROWS = 256  # largest batch; further prompts are queued


@dataclass(frozen=True)
class Generation:
    """The output for one prompt, and the finish reason; a stop sequence is not part of `data`."""

    prompt: bytes
    data: bytes
    reason: Reason


@dataclass(frozen=True)
class Chunk:
    """Final bytes of one request; its last piece, which may be empty, has the finish reason."""

    row: int
    data: bytes
    reason: Reason | None


@dataclass(frozen=True)
class Request:
    """A prompt and its generation options: see `pieces`. Samples depend on (seed, row).

    Raises UsageError for a negative `max_bytes`, an empty stop sequence, or one that is not UTF-8 when `utf8` is set.
    """

    prompt: bytes
    max_bytes: int = 256
    sampling: Sampling = DEFAULT
    seed: int = 0
    row: int = 0
    stop: Sequence[bytes] = ()
    utf8: bool = False
    eos: bool = True

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise UsageError(f"max_bytes {self.max_bytes} is negative: give 0 or more")
        for sequence in self.stop:
            if not sequence:
                raise UsageError("a stop sequence is empty: give each one byte or more, or leave it out")
            # UTF-8 stop sequences match at character boundaries only, so that no character is broken.
            if self.utf8 and not _is_utf8(sequence):
                raise UsageError(f"stop sequence {sequence!r} is not UTF-8, which utf8 asks for: leave one of them out")

    @property
    def ids(self) -> int:
        """Maximum length in ids, prompt included."""
        return 1 + len(self.prompt) + self.max_bytes


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class _Row:
    """The state of a row."""

    request_id: int
    request: Request
    unread: Ints
    """Ids of BOS and the prompt still to be prefilled."""
    left: int
    """Bytes that may still be generated."""
    characters: Utf8State | None
    tokens: Bpe | None = None
    held: bytes = b""
    """Bytes held back: a possible beginning of a stop sequence."""

    def write(self, symbol: int) -> Chunk:
        """Take one generated id, and return the bytes that become final. A token's bytes beyond the end are dropped."""
        if symbol == EOS:
            return Chunk(self.request_id, self.held, "eos")
        if self.characters:
            self.characters = self.characters.extend(torch.tensor([symbol]))
        given = b""
        for byte in (symbol,) if self.tokens is None else self.tokens.data[symbol]:
            self.left -= 1
            decided, held = stopping.release(self.held + bytes((byte,)), self.request.stop)
            given += decided
            if held is None:
                return Chunk(self.request_id, given, "stop")
            if not self.left:
                return Chunk(self.request_id, given + held, "length")
            self.held = held
        return Chunk(self.request_id, given, None)


@dataclass
class Session:
    """A running batch of a decoder."""

    decoder: Decoder
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self) -> None:
        rows = self.decoder.rows
        self.rows: dict[int, _Row] = {}
        self.free = list(range(rows))[::-1]
        self.tickets = 0
        # By row: the sampled id to read next, its random key, and the allowed ids.
        self.next: Ints = np.zeros(rows, np.int64)
        self.keys = np.zeros(rows, np.uint64)
        self.written = written(self.decoder.tokens)
        self.allowed = np.zeros((rows, len(self.written)), bool)
        self.writing = np.zeros(rows, bool)
        thread_pool = self.decoder.thread_pool
        self.threads = all_or_one(thread_pool.most) if thread_pool and thread_pool.most > 1 else None

    def submit(self, request: Request) -> int:
        """Admit a request to a free row; its pieces have the ticket. Raises UsageError if there is no room."""
        if not self.free:
            raise UsageError(f"all {self.decoder.rows} rows are in use: wait until a request has finished")
        if request.ids > self.decoder.capacity:
            raise UsageError(
                f"a prompt of {len(request.prompt)} bytes and {request.max_bytes} more take {request.ids} ids, "
                f"and a sequence holds at most {self.decoder.capacity}: shorten one of them"
            )
        tokens = self.decoder.tokens
        if tokens is not None and request.utf8:
            raise UsageError("utf8 constrains single bytes, and this model generates tokens: leave utf8 out")
        slot, request_id = self.free.pop(), self.tickets
        self.tickets += 1
        prompt = np.frombuffer(request.prompt, np.uint8) if tokens is None else tokens.encode(request.prompt)
        unread = np.concatenate([[BOS], prompt]).astype(np.int64)
        characters = Utf8State.after([request.prompt]) if request.utf8 else None
        self.rows[slot] = _Row(request_id, request, unread, request.max_bytes, characters, tokens)
        self.keys[slot] = row_key(request.seed, request.row)
        self.allowed[slot] = self.written
        self.allowed[slot, EOS] = request.eos
        return request_id

    def cancel(self, request_id: int) -> None:
        """Cancel a request. Raises UsageError for one that has finished."""
        for slot, row in self.rows.items():
            if row.request_id == request_id:
                return self.clear(slot)
        raise UsageError(f"no request has ticket {request_id}: it has finished")

    def clear(self, slot: int) -> None:
        """Reset a row."""
        self.decoder.rollback(np.array([slot]), np.zeros(1, np.int64))
        self.writing[slot] = False
        del self.rows[slot]
        self.free.append(slot)

    def step(self) -> list[Chunk]:
        """One step of every row; returns the final bytes in the order of the tickets."""
        if not self.rows:
            return []
        slots = self.writing.nonzero()[0]
        began = time.perf_counter()
        if len(slots) < len(self.rows):
            return self.ordered(self.read_on(slots))
        if self.threads and self.decoder.thread_pool:
            self.decoder.thread_pool.threads = self.threads.option
        drafts = self.room(slots)
        found = self.speculate(slots, drafts) if drafts else self.read_on(slots)
        took = time.perf_counter() - began
        if drafts or not self.speculation.option:
            self.speculation.note(took, sum(len(piece.data) for piece in found))
        if self.threads and not drafts:
            self.threads.note(took, len(slots))
        return self.ordered(found)

    @staticmethod
    def ordered(pieces: list[Chunk]) -> list[Chunk]:
        """By ticket, each request's in order."""
        return sorted(pieces, key=lambda piece: piece.row) if len(pieces) > 1 else pieces

    def read_on(self, writing: Ints) -> list[Chunk]:
        """Decode one id, prefill a chunk of prompts; then sample for all rows without ids left to read."""
        parts = {slot: row.unread[: self.decoder.chunk] for slot, row in self.rows.items() if len(row.unread)}
        slots = np.concatenate([writing, np.fromiter(parts, np.int64)])
        counts = np.concatenate([np.ones(len(writing), np.int64), [len(part) for part in parts.values()]])
        ids = np.concatenate([self.next[writing], *parts.values()])
        counts, slots = counts.astype(np.int64), slots.astype(np.int64)
        left = [len(self.rows[slot].unread) - len(part) for slot, part in parts.items()]
        done = np.concatenate([np.ones(len(writing), bool), np.array(left, np.int64) == 0])
        wanted = np.zeros(len(ids), bool)
        wanted[counts.cumsum()[done] - 1] = True
        logits = self.decoder.read(slots.repeat(counts), ids, wanted)
        for slot, part in parts.items():
            self.rows[slot].unread = self.rows[slot].unread[len(part) :]
        self.writing[slots] = done
        slots = slots[done]
        return self.write(slots, self.draw(slots, logits, self.decoder.lengths[slots]))

    def draw(self, slots: Ints, logits: Reals, positions: Ints) -> Ints:
        """Sample the next id of each row at its position; rows with equal settings together."""
        for slot in slots.tolist():
            row = self.rows[slot]
            if row.characters:
                allowed = row.characters.allowed(row.left).numpy()[0]
                allowed[EOS] &= row.request.eos
                self.allowed[slot] = allowed
        kinds: dict[Sampling, list[int]] = {}
        for index, slot in enumerate(slots.tolist()):
            kinds.setdefault(self.rows[slot].request.sampling, []).append(index)
        found = np.empty(len(slots), np.int64)
        for sampling, indices in kinds.items():
            mine = slots[indices]
            found[indices] = sampling.choose(logits[indices], self.keys[mine], positions[indices], self.allowed[mine])
        return found

    def write(self, slots: Ints, symbols: Ints) -> list[Chunk]:
        """Process the sampled ids: final bytes, finished rows."""
        self.next[slots] = symbols
        found: list[Chunk] = []
        for slot, symbol in zip(slots.tolist(), symbols.tolist(), strict=True):
            piece = self.rows[slot].write(symbol)
            if piece.reason:
                self.clear(slot)
            if piece.data or piece.reason:
                found.append(piece)
        return found

    # --- drafts -------------------------------------------------------------------------------------------------------

    def room(self, slots: Ints) -> int:
        """The number of bytes that all rows may draft."""
        length = self.speculation.option
        if not (self.decoder.drafts and length and len(slots)):
            return 0
        rows = [self.rows[slot] for slot in slots.tolist()]
        return 0 if any(row.characters for row in rows) else min(length, *(row.left - 1 for row in rows))

    def speculate(self, slots: Ints, count: int) -> list[Chunk]:
        """Draft `count` bytes per row with the local model, verify them in one pass, and keep the accepted prefix."""
        decoder, before = self.decoder, self.decoder.lengths[slots]
        guessed = np.empty((len(slots), count + 1), np.int64)
        guessed[:, 0] = self.next[slots]
        for index in range(count):
            logits = decoder.draft(slots, guessed[:, index])
            guessed[:, index + 1] = self.draw(slots, logits, before + index + 1)
        decoder.rollback(slots, before)
        logits = decoder.read(slots.repeat(count + 1), guessed.ravel()).reshape(len(slots), count + 1, -1)
        drawn = np.stack([self.draw(slots, logits[:, i], before + i + 1) for i in range(count + 1)], 1)
        right = (drawn[:, :-1] == guessed[:, 1:]).cumprod(1).sum(1)
        self.speculation.drafted += right.size * count
        self.speculation.accepted += int(right.sum())
        # Roll back to the first rejected byte; the id sampled in its place is read next.
        decoder.rollback(slots, before + 1 + right)
        found: list[Chunk] = []
        for index in range(count + 1):
            going = np.array([slot in self.rows for slot in slots.tolist()]) & (right >= index)
            found += self.write(slots[going], drawn[going, index])
        return found


def generate(
    model: ByteModel,
    prompts: Sequence[bytes],
    *,
    max_bytes: int = 256,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    stop: Sequence[bytes] = (),
    utf8: bool = False,
    eos: bool = True,
    quantize: Quantization | None = None,
) -> list[Generation]:
    """Generate from each prompt; the options are those of `pieces`."""
    written = [bytearray() for _ in prompts]
    reasons: dict[int, Reason] = {}
    options = Request(b"", max_bytes, sampling, seed, 0, stop, utf8, eos)
    for piece in _run(model, prompts, options, quantize):
        written[piece.row] += piece.data
        if piece.reason:
            reasons[piece.row] = piece.reason
    return [Generation(prompt, bytes(written[row]), reasons[row]) for row, prompt in enumerate(prompts)]


def stream(
    model: ByteModel,
    prompt: bytes,
    *,
    max_bytes: int = 256,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    stop: Sequence[bytes] = (),
    utf8: bool = False,
    eos: bool = True,
    quantize: Quantization | None = None,
) -> Iterator[bytes]:
    """Stream the bytes after one prompt; the options are those of `pieces`."""
    options = Request(b"", max_bytes, sampling, seed, 0, stop, utf8, eos)
    return (piece.data for piece in _run(model, [prompt], options, quantize) if piece.data)


def pieces(
    model: ByteModel,
    prompts: Sequence[bytes],
    *,
    max_bytes: int = 256,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    stop: Sequence[bytes] = (),
    utf8: bool = False,
    eos: bool = True,
    quantize: Quantization | None = None,
) -> Iterator[Chunk]:
    """Generate from each prompt, and stream the bytes of every sequence.

    A sequence ends with EOS (never without `eos`), before the first stop sequence, or after `max_bytes` bytes. Bytes
    that may be the beginning of a stop sequence are held back. The output of row r depends on its prompt and on
    (seed, r), and not on the rest of the batch, on chunking or on drafts; only without kernels torch may round
    differently in a larger batch.

    With `utf8` the generated bytes continue valid UTF-8 and end with a whole character: they first finish the one
    that the prompt leaves open, and start none for which too few bytes are left. Invalid bytes earlier in a prompt are
    ignored; a row whose open character needs more than `max_bytes` generates nothing.

    `quantize`: linear layers in "bf16" or "int8", see `decoding.open_decoder`. Raises UsageError for options outside
    their limits, see `Request`.
    """
    return _run(model, prompts, Request(b"", max_bytes, sampling, seed, 0, stop, utf8, eos), quantize)


def _run(
    model: ByteModel, prompts: Sequence[bytes], options: Request, quantize: Quantization | None
) -> Iterator[Chunk]:
    """All prompts through one session; prompts without a free row are queued."""
    needed = Utf8State.after(prompts).missing().tolist() if options.utf8 else [0] * len(prompts)
    begin = [row for row, need in enumerate(needed) if max(need, 1) <= options.max_bytes]
    yield from (Chunk(row, b"", "length") for row in range(len(prompts)) if row not in set(begin))
    if not begin:
        return
    longest = max(len(prompts[row]) for row in begin)
    session = Session(_opened(model, min(len(begin), ROWS), 1 + longest + options.max_bytes, quantize))
    of: dict[int, int] = {}
    waiting = begin[::-1]
    while waiting or session.rows:
        while waiting and session.free:
            row = waiting.pop()
            own = (prompts[row], options.max_bytes, options.sampling, options.seed, row)
            of[session.submit(Request(*own, options.stop, options.utf8, options.eos))] = row
        what = f"{len(session.rows)} sequences of up to {session.decoder.capacity} ids"
        with fitting(
            model.device, what, lambda: "give fewer prompts, shorter ones or fewer bytes, or take --device cpu"
        ):
            found = session.step()
        yield from (Chunk(of[piece.row], piece.data, piece.reason) for piece in found)


def _opened(model: ByteModel, rows: int, capacity: int, quantize: Quantization | None) -> Decoder:
    """A decoder of so many rows, or of fewer if memory is insufficient. Raises ResourceError if not even for one."""
    while True:
        try:
            return open_decoder(model, rows=rows, capacity=capacity, quantize=quantize)
        except (MemoryError, torch.OutOfMemoryError):
            if rows == 1:
                raise ResourceError(
                    f"no memory for a sequence of {capacity} ids: give a shorter prompt or fewer bytes"
                ) from None
            rows //= 2
