"""Continuous batching: requests enter at any step, are prefilled in chunks beside decoding ones, and retire.

join(request) → ticket      admit a request to a free row
step() → pieces             prefill a chunk of each prompt, decode a byte (or a draft) of every other row
leave(ticket)               cancel; a row is also freed after its last piece
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bytelm.decoding import Decoder
from bytelm.errors import UsageError
from bytelm.generate.online import OnlineRow
from bytelm.generate.request import Chunk, Request, Row, scored
from bytelm.generate.sampling import Ints, Reals, Sampling, row_key, written
from bytelm.generate.speculate import NONE, Draft, Guesser, Speculation, drafts_of
from bytelm.online.memory import Memory
from bytelm.threads import all_or_one
from bytelm.units import EOS

AHEAD = 4  # chunks of prompts that a step reads where none writes and `prefill` is bounded


@dataclass
class Session:
    """A running batch of a decoder."""

    decoder: Decoder
    drafts: Sequence[Draft] | None = None
    """What may be drafted, the default first; None: all that the decoder has. It changes the speed alone."""
    prefill: int | None = None
    """Ids of prompts that a step reads beside rows that write, which wait for it; None: no limit."""
    read_before: Callable[[], Memory] | None = None
    """Opens the memory that guesses the bytes of a row; None: it begins empty."""

    def __post_init__(self) -> None:
        rows = self.decoder.rows
        self.speculation = Speculation(drafts_of(self.decoder) if self.drafts is None else self.drafts)
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
        by_byte = request.utf8 or request.constraint or request.logprobs is not None or request.online is not None
        if tokens is not None and by_byte:
            raise UsageError(
                "utf8, constraints, logprobs and online are of single bytes, and this model generates tokens: "
                "leave them out"
            )
        prompt, constraint = request.read(tokens), request.constrained()
        online = OnlineRow.begun(request.online)
        slot, reused = self.place(prompt[:0] if request.reads_all else prompt)
        self.free.remove(slot)
        self.decoder.rollback(np.array([slot]), np.array([reused]))
        request_id, unread = self.tickets, prompt[reused:]
        self.tickets += 1
        own = Row(
            request_id, request, prompt, unread, request.max_bytes, constraint, tokens, reused=reused, online=online
        )
        self.rows[slot] = own
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
        if len(slots) < len(self.rows):
            return self.ordered(self.read_on(slots))
        if self.threads and self.decoder.thread_pool:
            self.decoder.thread_pool.threads = self.threads.option
        tuner = self.speculation.tuner(len(slots))
        draft = self.drafting(slots, tuner.option)
        guesser = self.guesser(int(slots[0])) if draft.source == "memory" else None
        began = time.perf_counter()
        guessed = self.guesses(slots, draft, guesser)
        found = self.verify(slots, guessed) if guessed.size else self.read_on(slots)
        took = time.perf_counter() - began
        if draft.source == tuner.option.source:
            tuner.note(took, sum(len(piece.data) for piece in found))
        if self.threads and not guessed.size:
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
            row.unread = row.ids
            try:
                row.online = OnlineRow.begun(row.request.online)
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
        whole = np.array([self.rows[slot].request.reads_all for slot in slots.tolist()], bool)
        wanted = (whole & (np.arange(len(slots)) >= len(writing))).repeat(counts)
        wanted[counts.cumsum()[done] - 1] = True
        read, before = slots, self.decoder.lengths[slots]
        logits = self.decoder.read(slots.repeat(counts), ids, wanted)
        last = logits[wanted.cumsum()[counts.cumsum()[done] - 1] - 1]
        for slot, part in parts.items():
            self.rows[slot].unread = self.rows[slot].unread[len(part) :]
        slots = slots[done]
        going = np.array([self.rows[slot].left > 0 for slot in slots.tolist()], bool)
        ended, slots, last = slots[~going], slots[going], last[going]
        prompts = list(self.prompt_logits(read, before, counts, wanted, logits)) if whole.any() else []
        for row, first, some in prompts:
            if row.online:
                row.online.learn(row.ids[first + 1 : first + 1 + len(some)], some)
        last = self.mixed(slots, last)
        symbols = self.draw(slots, last, self.decoder.lengths[slots])  # may raise: what was found would be lost
        found = self.prompt_scores(prompts)
        self.writing[slots] = True
        return found + self.finished(ended) + self.write(slots, symbols, last)

    def finished(self, slots: Ints) -> list[Chunk]:
        """Rows that have read their prompt and are to write nothing."""
        found = [Chunk(self.rows[slot].request_id, b"", "length") for slot in slots.tolist()]
        for slot in slots.tolist():
            self.clear(slot)
        return found

    def prompt_logits(
        self, slots: Ints, before: Ints, counts: Ints, wanted: Any, logits: Reals
    ) -> Iterator[tuple[Row, int, Reals]]:
        """Of rows that want them all: the place of the first id that was read, and the logits after each.

        `before`: ids read earlier; `logits` are those of the `wanted` ids.
        """
        firsts = wanted.cumsum()[counts.cumsum() - counts] - 1
        for slot, begin, count, at in zip(*(x.tolist() for x in (slots, before, counts, firsts)), strict=True):
            row = self.rows[slot]
            known = len(row.prompt) + len(row.written) - 1 - begin  # after the last id of a row stands none yet
            if row.request.reads_all and known > 0:
                yield row, begin, logits[at : at + min(count, known)]

    @staticmethod
    def prompt_scores(prompts: Iterable[tuple[Row, int, Reals]]) -> list[Chunk]:
        """Scores of the next ids of prompts, each once."""
        found: list[Chunk] = []
        for row, begin, logits in prompts:
            first = max(begin, row.scored)
            last = min(begin + len(logits), len(row.prompt) - 1)
            if row.request.score_prompt and first < last:
                some = logits[first - begin : last - begin]
                scores = scored(some, row.prompt[first + 1 : last + 1], row.request.logprobs or 0)
                row.scored = last
                found.append(Chunk(row.request_id, b"", None, prompt_scores=scores))
        return found

    def mixed(self, slots: Ints, logits: Reals) -> Reals:
        """Logits of the next place `[rows, vocab]`: of rows beside a memory those of both."""
        rows = [self.rows[slot].online for slot in slots.tolist()]
        if not any(rows):
            return logits
        return np.stack([one.mixed(line) if one else line for one, line in zip(rows, logits, strict=True)])

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
            elif row.online:
                row.online.update(symbol)
            if piece.data or piece.reason:
                found.append(piece)
        return found

    # --- drafts -------------------------------------------------------------------------------------------------------

    def drafting(self, slots: Ints, wanted: Draft) -> Draft:
        """What rows may draft now; all of them the same number of bytes."""
        if not wanted.length:
            return NONE
        rows = [self.rows[slot] for slot in slots.tolist()]
        # What depends on more than the bytes before goes byte by byte.
        alone = any(row.constraint or row.online or row.request.logprobs is not None for row in rows)
        length = 0 if alone else min(wanted.length, self.decoder.chunk - 1, *(row.left - 1 for row in rows))
        return wanted._replace(length=length) if length else NONE

    def guesser(self, slot: int) -> Guesser:
        """The guesser of a row, which has followed it."""
        row = self.rows[slot]
        if row.guesser is None:
            row.guesser = Guesser.begun(self.read_before)
        row.guesser.follow(row.ids)
        return row.guesser

    def guesses(self, slots: Ints, draft: Draft, guesser: Guesser | None) -> Ints:
        """The next bytes of rows as a draft guesses them `[rows, bytes]`."""
        decoder, before = self.decoder, self.decoder.lengths[slots]
        if not draft.length:
            return np.empty((len(slots), 0), np.int64)
        if guesser:
            found = guesser.guess(draft.length, lambda logits, n: int(self.draw(slots, logits, before + n + 1)[0]))
            return np.array([found], np.int64)
        symbols = np.empty((len(slots), draft.length + 1), np.int64)
        symbols[:, 0] = self.next[slots]
        for index in range(draft.length):
            logits = decoder.draft(slots, symbols[:, index])
            symbols[:, index + 1] = self.draw(slots, logits, before + index + 1)
        decoder.rollback(slots, before)
        return symbols[:, 1:]

    def verify(self, slots: Ints, guessed: Ints) -> list[Chunk]:
        """Read guesses `[rows, bytes]` in one pass, and keep of each row those before the first wrong one."""
        decoder, before, count = self.decoder, self.decoder.lengths[slots], guessed.shape[1]
        ids = np.concatenate([self.next[slots][:, None], guessed], axis=1)
        logits = decoder.read(slots.repeat(count + 1), ids.ravel()).reshape(len(slots), count + 1, -1)
        drawn = np.stack([self.draw(slots, logits[:, i], before + i + 1) for i in range(count + 1)], 1)
        right = (drawn[:, :-1] == guessed).cumprod(1).sum(1)
        self.speculation.drafted += right.size * count
        self.speculation.accepted += int(right.sum())
        # Roll back to the first rejected byte; the id sampled in its place is read next.
        decoder.rollback(slots, before + 1 + right)
        found: list[Chunk] = []
        for index in range(count + 1):
            going = np.array([slot in self.rows for slot in slots.tolist()]) & (right >= index)
            found += self.write(slots[going], drawn[going, index])
        return found
