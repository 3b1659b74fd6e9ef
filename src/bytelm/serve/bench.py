"""A load generator for any OpenAI-compatible server: `bytelm bench serve` (extra `serve`).

    arrivals → ask (one request, one answer) → Answer → summary

Open loop (`rate`): requests arrive in a Poisson process and do not wait for earlier answers, so a server that stalls
is measured as its users see it. Closed loop (`concurrency`): each of so many clients asks again when it is answered.
Times are in seconds from the start of the load; all that happens to a request counts from its arrival.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bytelm.errors import MissingExtraError, ResourceError, UsageError
from bytelm.serve.client import Answer, Events, seconds_of

WORDS = "the of and to a in that it is was I for on you he be with as by at have are this not but had his they"
REFUSED = 429
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds a closed-loop client waits after a failure; Retry-After overrides the first
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """What is asked of a server, and how often.

    Raises UsageError for a URL that is none, and for values outside their limits.
    """

    url: str
    """Of the server, with or without /v1."""
    rate: float | None = None
    """Open loop: arrivals per second."""
    concurrency: int | None = None
    """Closed loop: clients."""
    requests: int | None = None
    """The most to send."""
    seconds: float | None = None
    """How long requests are sent; those in progress then are still awaited."""
    model: str | None = None
    """None: the first that the server lists."""
    prompts: Sequence[str] = ()
    """Sent in turn; empty: random words, others for each request."""
    prompt_bytes: int = 256
    max_tokens: int = 128
    stream: bool = True
    chat: bool = False
    """/v1/chat/completions in place of /v1/completions."""
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further fields of every request."""
    seed: int = 0
    """Of arrivals and prompts; request i asks for samples with seed + i."""
    key: str | None = None
    """The API key."""
    timeout: float = 600.0
    """Seconds for one request."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise UsageError(f"{self.url!r} is not the URL of a server: give one as in http://127.0.0.1:8000")
        if (self.rate is None) == (self.concurrency is None):
            raise UsageError("--rate (open loop) and --concurrency (closed loop) exclude each other: give one of them")
        if self.requests is None and self.seconds is None:
            raise UsageError("nothing ends the load: give --requests or --seconds")
        limits = {"--rate": self.rate, "--concurrency": self.concurrency, "--requests": self.requests}
        limits |= {"--seconds": self.seconds, "--prompt-bytes": self.prompt_bytes, "--timeout": self.timeout}
        for option, value in limits.items():
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{option} {value} is not positive: give a number above 0")
        if self.max_tokens < 0:
            raise UsageError(f"--max-tokens {self.max_tokens} is negative: give 0 or more")

    @property
    def root(self) -> str:
        """The URL up to /v1."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return f"{self.root}/chat/completions" if self.chat else f"{self.root}/completions"

    def request(self, index: int, model: str) -> dict[str, Any]:
        """The body of request `index`."""
        given = self.prompts
        text = given[index % len(given)] if given else words(f"{self.seed}/{index}", self.prompt_bytes)
        asked = {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}
        body = {"model": model, **asked, "max_tokens": self.max_tokens, "seed": self.seed + index}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | dict(self.body)


def words(seed: str, length: int) -> str:
    """Random words, `length` bytes of ASCII."""
    draw = random.Random(seed)
    known = WORDS.split()
    return " ".join(draw.choice(known) for _ in range(length))[:length]


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process of `rate` per second, without end; the same seed gives the same times."""
    draw = random.Random(f"arrivals/{seed}")
    return itertools.accumulate(draw.expovariate(rate) for _ in itertools.count())


# --- the load ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A load in progress, and the answers so far."""

    load: Load
    answers: list[Answer] = field(default_factory=list[Answer])
    model: str = ""
    interrupted: bool = False
    began: float = 0.0
    lasted: float = 0.0
    """Seconds, once it has ended."""

    @property
    def now(self) -> float:
        """Seconds from the start."""
        return time.perf_counter() - self.began

    async def measure(self) -> None:
        """Send the load and await its answers; when cancelled, keep what was measured.

        Raises MissingExtraError without aiohttp, ResourceError if the server cannot be reached.
        """
        try:
            import aiohttp
        except ImportError as error:
            raise MissingExtraError("aiohttp", "serve", "bytelm bench serve") from error
        headers = {"Accept-Encoding": "identity"}  # compressed, events may be held back
        if self.load.key:
            headers["Authorization"] = f"Bearer {self.load.key}"
        timeout = aiohttp.ClientTimeout(total=self.load.timeout)
        connector = aiohttp.TCPConnector(limit=0)  # the load says how many
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
            self.model = self.load.model or await first_model(session, self.load.root)
            self.began = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as tasks:
                    await (self.open(session, tasks) if self.load.rate else self.closed(session, tasks))
            except asyncio.CancelledError:
                self.interrupted = True
            self.lasted = self.now

    async def open(self, session: Any, tasks: asyncio.TaskGroup) -> None:
        """Requests at their arrivals, whatever happens to those before."""
        for index, arrival in enumerate(arrivals(self.load.rate or 1.0, self.load.seed)):
            if self.over(index, arrival):
                return
            await asyncio.sleep(max(0.0, arrival - self.now))
            tasks.create_task(self.ask(session, index, arrival))

    async def closed(self, session: Any, tasks: asyncio.TaskGroup) -> None:
        """As many clients as there are, each with one request at a time."""
        indices = itertools.count()

        async def client() -> None:
            while not self.over(index := next(indices), self.now):
                answer = await self.ask(session, index, self.now)
                if not answer.complete:
                    pause = PAUSE if answer.retry_after is None else answer.retry_after
                    await asyncio.sleep(min(pause, LONGEST_PAUSE))

        for _ in range(self.load.concurrency or 1):
            tasks.create_task(client())

    def over(self, index: int, at: float) -> bool:
        """Whether request `index` at this time is one too many."""
        requests, seconds = self.load.requests, self.load.seconds
        return (requests is not None and index >= requests) or (seconds is not None and at >= seconds)

    async def ask(self, session: Any, index: int, arrival: float) -> Answer:
        """One request."""
        import aiohttp

        body = self.load.request(index, self.model)
        answer = Answer(index, arrival, self.now)
        self.answers.append(answer)
        try:
            async with session.post(self.load.endpoint, json=body) as response:
                answer.status = response.status
                if response.status != 200:
                    answer.error = str(response.status)
                    answer.retry_after = seconds_of(response.headers.get("Retry-After"))
                    await response.read()
                else:
                    await self.receive(response, answer)
        except TimeoutError:
            answer.error = "timeout"
        except (aiohttp.ClientError, OSError):
            answer.error = "connection"
        answer.end = self.now
        return answer

    async def receive(self, response: Any, answer: Answer) -> None:
        """The body of an answer: events, or one JSON object."""
        answer.streamed = response.content_type == "text/event-stream"
        if not answer.streamed:
            answer.take((await response.read()).decode(errors="replace"), self.now)
            return
        events = Events()
        async for received in response.content.iter_any():
            now = self.now
            for event in events.feed(received):
                answer.take(event, now)
        for event in events.close():
            answer.take(event, self.now)
        if not (answer.finished or answer.error):
            answer.error = "cut off"


async def first_model(session: Any, root: str) -> str:
    """The first model that a server lists. Raises ResourceError."""
    import aiohttp

    try:
        async with session.get(f"{root}/models") as response:
            if response.status != 200:
                raise ResourceError(
                    f"{root}/models: status {response.status}: give the model as --model NAME, or the key that it needs"
                )
            return str((await response.json(content_type=None))["data"][0]["id"])
    except (aiohttp.ClientError, OSError) as error:
        raise ResourceError(f"{root} cannot be reached ({error}): start a server there, or give its URL") from None
    except (ValueError, LookupError, TypeError):
        raise ResourceError(f"{root}/models lists no model: give one as --model NAME") from None


async def with_progress(run: Run, say: Callable[[Run], None], every: float = 0.5) -> None:
    """`run.measure`, with a call of `say` every so many seconds."""

    async def report() -> None:
        while True:
            await asyncio.sleep(every)
            say(run)

    reporter = asyncio.create_task(report())
    try:
        await run.measure()
    finally:
        reporter.cancel()


# --- figures ----------------------------------------------------------------------------------------------------------


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """p50, p95 and p99, interpolated, and the mean and the maximum; None of no values."""
    given = list(values)
    if not given:
        return None
    found = {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(given, PERCENTILES), strict=True)}
    return {**found, "mean": float(np.mean(given)), "max": max(given)}


def summary(run: Run) -> dict[str, Any]:
    """What was measured. Rates are over the whole load; bytes and tokens are those of complete answers.

    `seconds` has percentiles over complete answers: `first_byte` and `latency` from the arrival, `per_byte` the mean
    of each answer after its first event, `gap` between events with bytes, of all answers together, and `late`, from
    the arrival until this client sent the request (of all requests).
    """
    answers, lasted = run.answers, run.lasted or run.now
    complete = [answer for answer in answers if answer.complete]
    streamed = [answer for answer in complete if answer.streamed]
    counted = [answer.tokens for answer in complete if answer.tokens is not None]
    waits = [
        answer.retry_after for answer in answers if answer.error == str(REFUSED) and answer.retry_after is not None
    ]
    written = sum(len(answer.data) for answer in complete)
    gaps = (b - a for answer in streamed for (a, _), (b, _) in itertools.pairwise(answer.pieces))
    return {
        "model": run.model,
        "lasted": lasted,
        "requests": len(answers),
        "complete": len(complete),
        "unfinished": sum(answer.end is None for answer in answers),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
        "retry_after": [min(waits), max(waits)] if waits else None,
        "bytes": written,
        "tokens": sum(counted) if counted else None,
        "requests_per_s": len(complete) / lasted,
        "bytes_per_s": written / lasted,
        "tokens_per_s": sum(counted) / lasted if counted else None,
        "seconds": {
            "first_byte": percentiles(a.pieces[0][0] - a.arrival for a in streamed if a.pieces),
            "per_byte": percentiles(a.per_byte for a in streamed if a.per_byte is not None),
            "gap": percentiles(gaps),
            "latency": percentiles(a.end - a.arrival for a in complete if a.end is not None),
            "late": percentiles(a.sent - a.arrival for a in answers),
        },
    }
