"""A model that is served: its running batch, its queue, and the sequences of requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bytelm.decoding import open_decoder
from bytelm.errors import UsageError
from bytelm.generate.request import Chunk, Request
from bytelm.generate.session import Session
from bytelm.lm import LM
from bytelm.machine import memory
from bytelm.online import saved
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.serve import logs
from bytelm.serve.queue import FairQueue

PREFILL = 64
"""Ids of prompts that a step reads beside rows that write: more would hold these up."""
LEAST = 4096  # ids of a sequence, by default, where the model was trained on shorter ones
COLD = 32 << 20  # bytes of the memory of a request that begins with an empty one
SHARE = 0.5  # of free memory, at most, for the caches of a batch


@dataclass(eq=False)
class Running:
    """One sequence of an answer, from its arrival to its last chunk."""

    served: Served
    answer: Answer
    index: int
    request: Request
    client: str
    arrived: float = field(default_factory=time.perf_counter)
    session: Session | None = None
    request_id: int = -1
    begun: bool = False


class Answer:
    """The chunks of one HTTP request: of several sequences, as (index, chunk), in the order of their steps.

    Belongs to the event loop; only `deliver` of the engine adds to it.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.running: list[Running] = []
        self.chunks: deque[tuple[int, Chunk]] = deque()
        self.ready = asyncio.Event()
        self.open = len(requests)
        """Sequences that have not ended."""
        self.reused = [0] * len(requests)
        """Ids of each prompt that were not read again."""

    def push(self, index: int, chunk: Chunk) -> None:
        """Add a chunk."""
        if chunk.reason:
            self.open -= 1
        self.chunks.append((index, chunk))
        self.ready.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, Chunk]]]:
        """All chunks that are there at a time, until the last."""
        while self.open or self.chunks:
            await self.ready.wait()
            self.ready.clear()
            found = list(self.chunks)
            self.chunks.clear()
            yield found


@dataclass(frozen=True)
class Checkpoint:
    """Loaded weights, and where they are from."""

    lm: LM
    path: Path
    step: int | None


class Served:
    """A model: its running batch, its queue, and batches of replaced weights that still write."""

    def __init__(self, name: str, checkpoint: Checkpoint, rows: int, queue: int, capacity: int | None) -> None:
        self.name, self.checkpoint = name, checkpoint
        self.capacity = capacity or max(LEAST, checkpoint.lm.context)
        """Ids of a sequence at most."""
        self.asked = rows
        self.session = self.opened(checkpoint.lm)
        self.retired: list[Session] = []
        self.queue: FairQueue[Running] = FairQueue(queue)
        self.running: dict[tuple[int, int], Running] = {}
        """By session and ticket."""
        self.memories: dict[saved.Kind, Memory] = {}
        """Those that requests asked for, as each begins."""
        self.broken: Exception | None = None
        """Why no batch could be opened."""
        self.pace = 0.0
        """Seconds of a step, smoothed."""
        self.prefill_rate = 0.0
        """Ids per second that prompts are read at, smoothed."""

    @property
    def lm(self) -> LM:
        """The model."""
        return self.checkpoint.lm

    @property
    def step(self) -> int | None:
        """The training step of its weights."""
        return self.checkpoint.step

    @property
    def fingerprint(self) -> str:
        """What a client sees change with the weights."""
        return f"step-{self.step}"

    def opened(self, lm: LM) -> Session:
        """A batch of as many rows as were asked for, or as memory is there for. Raises ResourceError."""
        row = open_decoder(lm.model, rows=1, capacity=self.capacity).row_bytes
        free = memory().free
        rows = self.asked if not free or not row else max(1, min(self.asked, int(SHARE * free) // row))
        if rows < self.asked:
            logs.write("fewer rows", logging.WARNING, model=self.name, rows=rows, asked=self.asked, row_bytes=row)
        decoder = open_decoder(lm.model, rows=rows, capacity=self.capacity)
        return Session(decoder, prefill=PREFILL, read_before=saved.reader(self.checkpoint.path))

    def memory_for(self, kind: saved.Kind | None) -> Memory | None:
        """The memory that copies of a request begin with. Raises UsageError and CheckpointError."""
        if kind is None:
            return None
        if kind not in self.memories:
            if kind == "primed" and saved.reader(self.checkpoint.path) is None:  # its path is not for clients
                raise UsageError(f"online primed: {self.name} has no memory: its operator can run `bytelm prime`")
            self.memories[kind] = saved.opened(self.checkpoint.path, kind, Settings(memory=COLD))
        return self.memories[kind]

    def check(self, request: Request) -> None:
        """Raises UsageError for a request that no row could take."""
        if request.ids > self.capacity:
            raise UsageError(
                f"a prompt of {len(request.prompt)} bytes and {request.max_bytes} more take {request.ids} ids, and a "
                f"sequence of {self.name} holds at most {self.capacity}: shorten one of them"
            )
        single = request.utf8 or request.constraint or request.logprobs is not None or request.online is not None
        if self.lm.model.tokens is not None and (single or not isinstance(request.prompt, bytes)):
            raise UsageError(
                f"{self.name} generates tokens: ids, utf8, response_format, logprobs, echo and online are for models "
                "over bytes"
            )

    @property
    def rows(self) -> int:
        """Sequences that run at once."""
        return self.session.decoder.rows
