"""The command that measures a running server: bench serve."""

from __future__ import annotations

import json as reading
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from bytelm.cli.common import Json, Quiet, print_json, print_table
from bytelm.errors import DataError, UsageError

if TYPE_CHECKING:
    from bytelm.serve.bench import Load, Run

app = App(name="bench", help="Measure a running server.")

CONCURRENCY, REQUESTS = 8, 100
RARELY = 10.0  # seconds between lines of progress that go to a file


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How often a server is asked."""

    rate: float | None = None
    """Open loop: mean requests per second, as a Poisson process that does not wait for answers."""
    concurrency: int | None = None
    """Closed loop: clients, each with one request at a time; after a 429 one waits for Retry-After (default: 8)."""
    requests: int | None = None
    """The number of requests (default: 100, or no limit with --seconds)."""
    seconds: float | None = None
    """How long requests are sent; those in progress are then awaited."""
    timeout: float = 600.0
    """Seconds for one request."""
    seed: int = 0
    """Of arrivals and prompts; request i asks for samples with seed + i."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a server is asked."""

    model: str | None = None
    """The model (default: the first that the server lists)."""
    prompt_bytes: int = 256
    """The length of random prompts."""
    prompts: Path | None = None
    """A file with one prompt per line, as text or (.jsonl) as JSON objects with a "prompt"."""
    max_tokens: int = 128
    """The most that each request generates; for a byte model, bytes."""
    stream: bool = True
    """Ask for server-sent events; without them only whole answers are timed."""
    chat: Annotated[bool, Parameter(negative="")] = False
    """Use /v1/chat/completions."""
    body: str | None = None
    """A JSON object with further fields of every request."""
    api_key_file: Path | None = None
    """A file with the API key in its first line (default: the environment variable BYTELM_API_KEY)."""


@app.command
def serve(
    url: str,
    /,
    *,
    load: LoadOptions = LoadOptions(),
    request: RequestOptions = RequestOptions(),
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Measure latency and throughput of any OpenAI-compatible server under load.

    Example: bytelm bench serve http://127.0.0.1:8000 --concurrency 32 --requests 200
    Example: bytelm bench serve http://127.0.0.1:8000 --rate 4 --seconds 60 --json
    Example: bytelm bench serve http://127.0.0.1:8000 --body '{"temperature": 0, "ignore_eos": true}'

    Parameters
    ----------
    url
        Of the server, with or without /v1.
    """
    import asyncio

    from bytelm.serve.bench import Run, summary, with_progress

    run = Run(load_of(url, load, request))
    asyncio.run(with_progress(run, progress(quiet)))
    if not quiet and sys.stderr.isatty():
        print(file=sys.stderr)
    found = summary(run)
    print_json(found) if json else show(found)
    return 130 if run.interrupted else 0 if found["complete"] else 1


def load_of(url: str, load: LoadOptions, request: RequestOptions) -> Load:
    """The load that the options ask for. Raises UsageError, DataError."""
    from bytelm.serve.bench import Load

    return Load(
        url,
        rate=load.rate,
        concurrency=CONCURRENCY if load.rate is None and load.concurrency is None else load.concurrency,
        requests=REQUESTS if load.requests is None and load.seconds is None else load.requests,
        seconds=load.seconds,
        timeout=load.timeout,
        seed=load.seed,
        model=request.model,
        prompts=prompts_of(request.prompts) if request.prompts else [],
        prompt_bytes=request.prompt_bytes,
        max_tokens=request.max_tokens,
        stream=request.stream,
        chat=request.chat,
        body=body_of(request.body),
        key=key_of(request.api_key_file),
    )


def prompts_of(path: Path) -> list[str]:
    """The prompts of a file. Raises DataError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = [str(reading.loads(line)["prompt"]) for line in lines] if path.suffix == ".jsonl" else lines
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): name a file of prompts") from None
    except (ValueError, LookupError, TypeError):
        raise DataError(
            f'{path} is not UTF-8 with one prompt (.jsonl: {{"prompt": ...}}) per line: correct it'
        ) from None
    if not found:
        raise DataError(f"{path} has no prompt: write one per line")
    return found


def key_of(path: Path | None) -> str | None:
    """The API key, if there is one. Raises DataError."""
    if path is None:
        return os.environ.get("BYTELM_API_KEY") or None
    try:
        return path.read_text(encoding="utf-8").split()[0]
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): name a file with the API key") from None
    except (ValueError, LookupError):
        raise DataError(f"{path} has no API key: write it in the first line") from None


def body_of(text: str | None) -> dict[str, Any]:
    """Further fields of requests. Raises UsageError."""
    try:
        found = reading.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"--body {text!r} is not a JSON object: give one as in '{{\"temperature\": 0}}'")
    return found


def progress(quiet: bool) -> Callable[[Run], None]:
    """What reports a load in progress on standard error: on a terminal in one line, else now and then a line."""
    said = time.monotonic()

    def say(run: Run) -> None:
        nonlocal said
        terminal = sys.stderr.isatty()
        if quiet or not (terminal or time.monotonic() - said > RARELY):
            return
        said = time.monotonic()
        complete = sum(answer.complete for answer in run.answers)
        active = sum(answer.end is None for answer in run.answers)
        failed = len(run.answers) - complete - active
        rate = sum(len(answer.data) for answer in run.answers) / max(run.now, 1e-9)
        line = f"{complete} complete, {active} in progress, {failed} failed, {rate:,.0f} bytes/s"
        print(f"\r{line}   " if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return say


def show(found: dict[str, Any]) -> None:
    """The figures for people."""
    errors = ", ".join(f"{count} {name}" for name, count in sorted(found["errors"].items())) or "no errors"
    if found["retry_after"]:
        errors += " (Retry-After {:g} to {:g} s)".format(*found["retry_after"])
    left = f", {found['unfinished']} unfinished" if found["unfinished"] else ""
    sent = f"{found['requests']} requests to {found['model']} in {found['lasted']:.1f} s"
    print(f"{sent}: {found['complete']} complete{left}, {errors}")
    tokens = "" if found["tokens_per_s"] is None else f", {found['tokens_per_s']:,.1f} tokens/s"
    print(f"{found['requests_per_s']:.2f} requests/s, {found['bytes_per_s']:,.1f} bytes/s{tokens}")
    names = {
        "first_byte": "time to first byte",
        "per_byte": "per byte, mean of an answer",
        "gap": "between events",
        "latency": "latency",
        "late": "delay of this client",
    }
    rows = [(text, found["seconds"][name]) for name, text in names.items()]
    columns = ("mean", "p50", "p95", "p99", "max")
    cells = [(text, *(f"{1e3 * row[c]:,.2f}" for c in columns)) for text, row in rows if row is not None]
    print_table(["ms", *columns], cells)
