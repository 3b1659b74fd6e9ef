"""The engine: one thread that steps the running batch of every model, and hands chunks to the event loop.

Steps of several models alternate: their kernels would only take the cores from each other. All that reads a model's
weights runs in this thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from bytelm.errors import ResourceError, UsageError
from bytelm.generate.request import Chunk, Request
from bytelm.generate.session import Session
from bytelm.serve import logs
from bytelm.serve.metrics import Metrics
from bytelm.serve.queue import FullError
from bytelm.serve.served import PREFILL, Answer, Checkpoint, Running, Served

T = TypeVar("T")


class BusyError(Exception):
    """The queue is full; `retry` is the number of seconds after which a place can be expected."""

    def __init__(self, retry: int, limit: int) -> None:
        super().__init__(f"the queue is full ({limit} sequences wait): try again in {retry} s")
        self.retry = retry


class StoppingError(Exception):
    """The server takes no new requests, or ends those that run."""


class Engine:
    """Steps the batches of all models in one thread: submit, cancel and run from the event loop."""

    def __init__(self, models: Sequence[Served], metrics: Metrics) -> None:
        self.models = {served.name: served for served in models}
        self.metrics = metrics
        for served in models:
            metrics.running.labels(served.name).set_function(partial(len, served.running))
            metrics.waiting.labels(served.name).set_function(partial(len, served.queue))
        self.lock = threading.Condition()
        self.cancelled: list[Running] = []
        self.jobs: deque[tuple[Future[object], Callable[[], object]]] = deque()
        self.answers: set[Answer] = set()
        self.closing = False
        self.draining = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)

    # --- of the event loop --------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to step; chunks are delivered to this loop."""
        self.loop = loop
        self.thread.start()

    def submit(self, served: Served, requests: Sequence[Request], client: str) -> Answer:
        """Queue the sequences of one HTTP request. Raises BusyError, StoppingError, UsageError."""
        if self.draining:
            raise StoppingError("the server is shutting down: send the request to another one")
        if served.broken:
            raise StoppingError(f"{served.name} cannot be run: {served.broken}")
        for request in requests:
            served.check(request)
        if len(requests) > served.queue.limit:
            raise UsageError(
                f"{len(requests)} sequences in one request, and at most {served.queue.limit} are queued: give fewer "
                "prompts, or a smaller n"
            )
        answer = Answer(requests)
        answer.running = [Running(served, answer, index, one, client) for index, one in enumerate(requests)]
        with self.lock:
            try:
                served.queue.put(client, answer.running)
            except FullError:
                self.metrics.refused.labels(served.name).inc()
                raise BusyError(self.wait_of(served), served.queue.limit) from None
            self.lock.notify()
        self.answers.add(answer)
        return answer

    @staticmethod
    def wait_of(served: Served) -> int:
        """Seconds until the queue has room, roughly: what a row still has to write, at the pace of late; 1 to 60."""
        left = [row.left for row in tuple(served.session.rows.values())]  # a copy: the engine's thread changes it
        return max(1, min(60, round(sum(left) / max(1, len(left)) * served.pace)))

    def cancel(self, answer: Answer) -> None:
        """End all sequences of an answer before the next step; their chunks are dropped."""
        self.answers.discard(answer)
        if not answer.open:
            return
        with self.lock:
            for item in answer.running:
                if item.served.queue.remove(item.client, item):
                    self.metrics.requests.labels(item.served.name, "cancelled").inc()
                else:
                    self.cancelled.append(item)
            self.lock.notify()

    async def run(self, job: Callable[[], T]) -> T:
        """Run something that reads a model between two steps. Raises StoppingError."""
        if self.closing or not self.thread.is_alive():
            raise StoppingError("the engine has stopped: send the request to another server")
        future: Future[object] = Future()
        with self.lock:
            self.jobs.append((future, job))
            self.lock.notify()
        return await asyncio.wrap_future(future)  # type: ignore[return-value]

    def cut(self) -> None:
        """End every answer now, with an error."""
        error = StoppingError("the server is shutting down: the answer is cut off")
        for answer in list(self.answers):
            self.cancel(answer)
            for index in range(len(answer.requests)):
                answer.push(index, Chunk(-1, b"", "error", error=error))
            answer.open = 0

    def close(self) -> None:
        """Stop the thread."""
        with self.lock:
            self.closing = True
            self.lock.notify()
        if self.thread.is_alive():
            self.thread.join()

    def deliver(self, found: list[tuple[Running, Chunk]]) -> None:
        """Hand the chunks of a step to their answers."""
        for item, chunk in found:
            if item.answer in self.answers:
                item.answer.push(item.index, chunk)
                if not item.answer.open:
                    self.answers.discard(item.answer)

    # --- of the thread ------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Step until `close`. An error of the engine itself ends every answer, and `/health` says so."""
        try:
            while self.turn():
                pass
        except Exception as error:
            logs.write("engine stopped", logging.CRITICAL, error)
            for served in self.models.values():
                served.broken = error
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self.cut)
        for future, _ in self.jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(StoppingError("the engine has stopped"))

    def turn(self) -> bool:
        """Admit, cancel, step and deliver, once there is something to do; whether to go on."""
        with self.lock:
            while not (self.closing or self.jobs or self.cancelled or self.busy()):
                self.lock.wait()
            if self.closing:
                return False
            cancelled, self.cancelled = self.cancelled, []
            jobs = [self.jobs.popleft()] if self.jobs else []
        for item in cancelled:
            self.forget(item)
        for future, job in jobs:
            self.perform(future, job)
        found = [pair for served in self.models.values() for pair in self.step(served)]
        if found and self.loop is not None:
            self.loop.call_soon_threadsafe(self.deliver, found)
        return True

    def busy(self) -> bool:
        """Whether there is something to step or to admit."""
        return any(served.running or (len(served.queue) and not served.broken) for served in self.models.values())

    @staticmethod
    def perform(future: Future[object], job: Callable[[], object]) -> None:
        """Run a job."""
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

    def forget(self, item: Running) -> None:
        """Free the row of a cancelled sequence, unless it has ended meanwhile."""
        if item.session is not None and item.served.running.get((id(item.session), item.request_id)) is item:
            item.session.cancel(item.request_id)
            self.ended(item.served, item, "cancelled")

    def ended(self, served: Served, item: Running, reason: str) -> None:
        """A sequence has left its row."""
        del served.running[id(item.session), item.request_id]
        with self.lock:
            served.queue.done(item.client)
        self.metrics.requests.labels(served.name, reason).inc()

    def admit(self, served: Served) -> list[tuple[Running, Chunk]]:
        """Give free rows to waiting sequences."""
        found: list[tuple[Running, Chunk]] = []
        session = served.session
        while session.free and not served.broken:
            with self.lock:
                if not len(served.queue):
                    break
                client, item = served.queue.take()
            try:
                item.request_id = session.submit(item.request)
            except Exception as error:  # of its constraint, say
                with self.lock:
                    served.queue.done(client)
                found.append((item, Chunk(-1, b"", "error", error=error)))
                continue
            item.session = session
            served.running[id(session), item.request_id] = item
            row = next(row for row in session.rows.values() if row.request_id == item.request_id)
            item.answer.reused[item.index] = row.reused
            self.metrics.queued.labels(served.name).observe(time.perf_counter() - item.arrived)
            self.metrics.prompt.labels(served.name).inc(len(row.prompt))
            self.metrics.reused.labels(served.name).inc(row.reused)
            if served.prefill_rate:
                self.metrics.saved.labels(served.name).inc(row.reused / served.prefill_rate)
        return found

    def step(self, served: Served) -> list[tuple[Running, Chunk]]:
        """A step of a model's batches."""
        found = self.admit(served)
        metrics, name = self.metrics, served.name
        for session in [served.session, *served.retired]:
            if not session.rows:
                continue
            began = time.perf_counter()
            unread = sum(len(row.unread) for row in session.rows.values())
            chunks = self.stepped(served, session)
            took = time.perf_counter() - began
            metrics.step.labels(name).observe(took)
            served.pace = 0.9 * served.pace + 0.1 * took if served.pace else took
            read = unread - sum(len(row.unread) for row in session.rows.values())
            if read > PREFILL // 2:
                rate = read / took
                served.prefill_rate = 0.9 * served.prefill_rate + 0.1 * rate if served.prefill_rate else rate
            found += self.taken(served, session, chunks)
        served.retired = [session for session in served.retired if session.rows]
        return found

    def taken(self, served: Served, session: Session, chunks: list[Chunk]) -> list[tuple[Running, Chunk]]:
        """The chunks of a step with their sequences, counted."""
        found: list[tuple[Running, Chunk]] = []
        for chunk in chunks:
            item = served.running[id(session), chunk.row]
            if not item.begun and (chunk.data or chunk.reason):
                item.begun = True
                self.metrics.first.labels(served.name).observe(time.perf_counter() - item.arrived)
            self.metrics.generated.labels(served.name).inc(len(chunk.data))
            if chunk.reason:
                self.ended(served, item, chunk.reason)
            found.append((item, chunk))
        return found

    def stepped(self, served: Served, session: Session) -> list[Chunk]:
        """A step; when it raises, the rows go on one by one, and those that fail alone end."""
        try:
            return session.step()
        except Exception as error:
            self.metrics.failures.labels(served.name).inc()
            logs.write("step failed", logging.ERROR, error, model=served.name, rows=len(session.rows))
        try:
            return session.recover()
        except Exception as error:
            logs.write("batch lost", logging.ERROR, error, model=served.name, rows=len(session.rows))
            lost = [Chunk(row.request_id, b"", "error", error=error) for row in session.rows.values()]
        self.reopen(served, session)
        return lost

    def reopen(self, served: Served, session: Session) -> None:
        """Replace a batch that cannot go on. If none can be opened, the model is broken, and `/health` says so."""
        session.rows.clear()
        if session is served.session:
            try:
                served.session = served.opened(served.lm)
            except Exception as error:
                served.broken = error

    def replace(self, served: Served, checkpoint: Checkpoint) -> None:
        """Take newer weights for new sequences; those that run go on with theirs. For `run`."""
        session = served.opened(checkpoint.lm)
        if served.session.rows:
            served.retired.append(served.session)
        served.checkpoint, served.session = checkpoint, session
        served.broken = None


def failure(error: Exception | None) -> str:
    """What a client is told of a sequence that failed: a line for what it can act on, no internals otherwise."""
    if isinstance(error, UsageError | ResourceError | StoppingError):
        return str(error)
    return f"the sequence failed ({type(error).__name__}): the server's log has the details, by the request id"
