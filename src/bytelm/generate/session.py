"""Continuous batching: requests enter at any step, are prefilled in chunks beside decoding ones, and retire.

join(request) → ticket      admit a request to a free row
step() → pieces             prefill a chunk of each prompt, decode a byte (or a draft) of every other row
leave(ticket)               cancel; a row is also freed after its last piece
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bytelm.decoding import Decoder, Quantization, open_decoder
from bytelm.device import fitting
from bytelm.errors import ResourceError, UsageError
from bytelm.generate.request import Chunk, Generation, Reason, Request, Row, scored
from bytelm.generate.sampling import DEFAULT, Ints, Reals, Sampling, row_key, written
from bytelm.generate.speculate import Speculation
from bytelm.generate.utf8 import Utf8State
from bytelm.interfaces.model import ByteModel
from bytelm.threads import all_or_one
from bytelm.units import EOS

AHEAD = 4  # chunks of prompts that a step reads where none writes and `prefill` is bounded
ROWS = 256  # largest batch; further prompts are queued


@dataclass
class Session:
    """A running batch of a decoder."""

    decoder: Decoder
    speculation: Speculation = field(default_factory=Speculation)
    prefill: int | None = None
    """Ids of prompts that a step reads beside rows that write, which wait for it; None: no limit."""

    def __post_init__(self) -> None:
        rows = self.decoder.rows
        self.rows: dict[int, Row] = {}
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
        """Admit a request to a free row; its pieces have the ticket. Raises UsageError if there is no room.

        Of the free rows it gets the one that has read the longest prefix of its prompt, for an earlier request: those
        ids are not read again.
        """
        if not self.free:
            raise UsageError(f"all {self.decoder.rows} rows are in use: wait until a request has finished")
        if request.ids > self.decoder.capacity:
            raise UsageError(
                f"a prompt of {len(request.prompt)} bytes and {request.max_bytes} more take {request.ids} ids, "
                f"and a sequence holds at most {self.decoder.capacity}: shorten one of them"
            )
        tokens = self.decoder.tokens
        if tokens is not None and (request.utf8 or request.constraint or request.logprobs is not None):
            raise UsageError(
                "utf8, constraints and logprobs are of single bytes, and this model generates tokens: leave them out"
            )
        prompt, constraint = request.read(tokens), request.constrained()
        slot, reused = self.place(prompt[:0] if request.score_prompt else prompt)
        self.free.remove(slot)
        self.decoder.rollback(np.array([slot]), np.array([reused]))
        request_id, unread = self.tickets, prompt[reused:]
        self.tickets += 1
        self.rows[slot] = Row(request_id, request, prompt, unread, request.max_bytes, constraint, tokens, reused=reused)
        self.keys[slot] = row_key(request.seed, request.row)
        self.allowed[slot] = self.written
        self.allowed[slot, EOS] = request.eos
        return request_id

    def place(self, prompt: Ints) -> tuple[int, int]:
        """The free row that has read most of a prompt, and how many of its ids; else the one that has read least.

        The last id is always read: what follows it is asked for.
        """
        decoder, found = self.decoder, list[tuple[int, int, int]]()
        for slot in self.free:
            count = min(int(decoder.lengths[slot]), len(prompt) - 1)
            if count > 0:
                differs = np.flatnonzero(decoder.ids[slot, :count] != prompt[:count])
                count = decoder.reusable(slot, int(differs[0]) if len(differs) else count)
            found.append((max(count, 0), -int(decoder.lengths[slot]), slot))
        reused, _, slot = max(found)
        return slot, reused

    def cancel(self, request_id: int) -> None:
        """Cancel a request. Raises UsageError for one that has finished."""
        for slot, row in self.rows.items():
            if row.request_id == request_id:
                return self.clear(slot)
        raise UsageError(f"no request has ticket {request_id}: it has finished")

    def clear(self, slot: int) -> None:
        """Free a row; what it has read stays: see `place`."""
        self.writing[slot] = False
        del self.rows[slot]
        self.free.append(slot)

    def step(self) -> list[Chunk]:
        """One step of every row; returns the final bytes in the order of the tickets.

        Raises what reading or sampling raises; the rows can then go on with `recover`.
        """
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

    def recover(self) -> list[Chunk]:
        """After `step` raised: every row reads its ids again, alone; those that fail alone end, with their error.

        The others write what they would have written, as a row does not depend on its company.
        """
        found: list[Chunk] = []
        self.writing[:] = False
        for slot, row in list(self.rows.items()):
            self.decoder.rollback(np.array([slot]), np.zeros(1, np.int64))
            row.unread = np.concatenate([row.prompt, np.array(row.written, np.int64)])
            try:
                while slot in self.rows and not self.writing[slot]:
                    found += self.read_on(np.zeros(0, np.int64), slot)
            except Exception as error:  # whatever it is: it is this row's alone
                self.decoder.rollback(np.array([slot]), np.zeros(1, np.int64))
                self.clear(slot)
                found.append(Chunk(row.request_id, b"", "error", error=error))
        return self.ordered(found)

    @staticmethod
    def ordered(pieces: list[Chunk]) -> list[Chunk]:
        """By ticket, each request's in order."""
        return sorted(pieces, key=lambda piece: piece.row) if len(pieces) > 1 else pieces

    def parts(self, writing: Ints, only: int | None = None) -> dict[int, Ints]:
        """The ids of prompts that the next step reads, by row: the oldest requests first."""
        if only is not None:
            unread = self.rows[only].unread
            return {only: unread[: min(self.decoder.chunk, max(1, len(unread) - 1))]}
        room = (len(writing) and self.prefill) or self.decoder.chunk * (AHEAD if self.prefill else len(self.rows))
        found: dict[int, Ints] = {}
        for slot, row in sorted(self.rows.items(), key=lambda item: item[1].request_id):
            if room and len(row.unread):
                found[slot] = row.unread[: min(self.decoder.chunk, room)]
                room -= len(found[slot])
        return found

    def read_on(self, writing: Ints, only: int | None = None) -> list[Chunk]:
        """Decode one id, prefill a chunk of prompts; then sample for all rows without ids left to read.

        `only` this row: it reads the last id by itself, as it did when a step failed.
        """
        parts = self.parts(writing, only)
        slots = np.concatenate([writing, np.fromiter(parts, np.int64)])
        counts = np.concatenate([np.ones(len(writing), np.int64), [len(part) for part in parts.values()]])
        ids = np.concatenate([self.next[writing], *parts.values()])
        counts, slots = counts.astype(np.int64), slots.astype(np.int64)
        ended = np.array([len(self.rows[slot].unread) == len(part) for slot, part in parts.items()], bool)
        done = np.concatenate([np.ones(len(writing), bool), ended])
        scored = np.array([self.rows[slot].request.score_prompt for slot in slots.tolist()], bool)
        wanted = (scored & (np.arange(len(slots)) >= len(writing))).repeat(counts)
        wanted[counts.cumsum()[done] - 1] = True
        read, before = slots, self.decoder.lengths[slots]
        logits = self.decoder.read(slots.repeat(counts), ids, wanted)
        last = logits[wanted.cumsum()[counts.cumsum()[done] - 1] - 1]
        for slot, part in parts.items():
            self.rows[slot].unread = self.rows[slot].unread[len(part) :]
        slots = slots[done]
        going = np.array([self.rows[slot].left > 0 for slot in slots.tolist()], bool)
        ended, slots, last = slots[~going], slots[going], last[going]
        symbols = self.draw(slots, last, self.decoder.lengths[slots])  # may raise: what was found would be lost
        found = self.prompt_scores(read, before, counts, wanted, logits) if scored.any() else []
        self.writing[slots] = True
        return found + self.finished(ended) + self.write(slots, symbols, last)

    def finished(self, slots: Ints) -> list[Chunk]:
        """Rows that have read their prompt and are to write nothing."""
        found = [Chunk(self.rows[slot].request_id, b"", "length") for slot in slots.tolist()]
        for slot in slots.tolist():
            self.clear(slot)
        return found

    def prompt_scores(self, slots: Ints, before: Ints, counts: Ints, wanted: Any, logits: Reals) -> list[Chunk]:
        """Scores of the next ids of prompts. `before`: ids read earlier; `logits` are those of the `wanted` ids."""
        found: list[Chunk] = []
        ends, places = counts.cumsum(), wanted.cumsum()
        for slot, begin, count, end in zip(
            slots.tolist(), before.tolist(), counts.tolist(), ends.tolist(), strict=True
        ):
            row = self.rows[slot]
            first = max(begin, row.scored)
            last = min(begin + count, len(row.prompt) - 1)
            if not row.request.score_prompt or first >= last:
                continue
            at = int(places[end - count]) - 1 + first - begin
            scores = scored(logits[at : at + last - first], row.prompt[first + 1 : last + 1], row.request.logprobs or 0)
            row.scored = last
            found.append(Chunk(row.request_id, b"", None, prompt_scores=scores))
        return found

    def draw(self, slots: Ints, logits: Reals, positions: Ints) -> Ints:
        """Sample the next id of each row at its position; rows with equal settings together."""
        for slot in slots.tolist():
            row = self.rows[slot]
            if row.constraint:
                self.allowed[slot] = row.allowed(row.constraint)
        kinds: dict[Sampling, list[int]] = {}
        for index, slot in enumerate(slots.tolist()):
            kinds.setdefault(self.rows[slot].request.sampling, []).append(index)
        found = np.empty(len(slots), np.int64)
        for sampling, indices in kinds.items():
            mine = slots[indices]
            found[indices] = sampling.choose(logits[indices], self.keys[mine], positions[indices], self.allowed[mine])
        return found

    def write(self, slots: Ints, symbols: Ints, logits: Reals | None = None) -> list[Chunk]:
        """Process the sampled ids: final bytes, finished rows. `logits`: what they were sampled from, for scores."""
        self.next[slots] = symbols
        found: list[Chunk] = []
        for index, (slot, symbol) in enumerate(zip(slots.tolist(), symbols.tolist(), strict=True)):
            row, score = self.rows[slot], None
            if row.request.logprobs is not None and logits is not None:
                (score,) = scored(logits[index : index + 1], symbols[index : index + 1], row.request.logprobs)
            try:
                piece = row.write(symbol, score)
            except Exception as error:  # of its constraint: other rows have written already
                piece = Chunk(row.request_id, b"", "error", error=error)
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
        alone = any(row.constraint or row.request.logprobs is not None for row in rows)  # these go byte by byte
        return 0 if alone else min(length, *(row.left - 1 for row in rows))

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
