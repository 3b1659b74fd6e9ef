"""The log of a server: one JSON object per line on stderr.

Every line has `time` (UTC), `level` and `event`, and what the logger "bytelm.serve" was given as `extra`; a request has
its id, client, method, path, status, seconds and bytes. What a client sends is escaped and cut; keys are never in it,
and prompts only where that was asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any, TextIO

EVENTS = logging.getLogger("bytelm.serve")
PROMPTS = logging.getLogger("bytelm.serve.prompts")
# Of uvicorn's warnings ours say more.
LEVELS = {"bytelm.serve": logging.INFO, "uvicorn": logging.ERROR, "asyncio": logging.WARNING}
SHOWN = 300  # characters of a text that a client chose
FRAMES = 12  # of a traceback, the innermost ones
OWN = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # what every record has
# Errors whose texts are about the machine. Those of others (ValueError, KeyError) may quote what a client sent.
OPEN = (OSError, RuntimeError, MemoryError)


class Whole(str):
    """A text that is not cut."""


def write(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Log an event."""
    EVENTS.log(level, event, extra=fields | (failure(error) if error else {}))


def prompt(request_id: str, body: bytes) -> None:
    """Log the body of a request, if prompts are logged."""
    if PROMPTS.isEnabledFor(logging.INFO):
        PROMPTS.info("prompt", extra={"id": request_id, "body": Whole(body.decode(errors="replace"))})


def failure(error: BaseException) -> dict[str, Any]:
    """An error as fields: its type, where it was raised, and its text unless that may quote a client."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    found: dict[str, Any] = {"error": type(error).__name__}
    if isinstance(error, OPEN):
        found["text"] = str(error)
    return found | {"at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}


class Lines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line. JSON in ASCII: control characters, line separators and broken Unicode are escaped."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time.replace("+00:00", "Z"), "level": record.levelname.lower()}
        line["event"] = record.getMessage().strip()[:SHOWN]
        error = record.exc_info[1] if record.exc_info else None
        fields = {name: value for name, value in vars(record).items() if name not in OWN}
        for name, value in (fields | (failure(error) if error else {})).items():
            line[name] = value[:SHOWN] if isinstance(value, str) and not isinstance(value, Whole) else value
        return json.dumps(line, default=str)


class Stream(logging.StreamHandler[TextIO]):
    """A handler that survives a stream that was closed."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line: a request is worth more."""


@contextlib.contextmanager
def lines(prompts: bool = False) -> Generator[None, None, None]:
    """As long as this lasts, write the events of a server, of uvicorn and of asyncio to stderr."""
    handler = Stream(sys.stderr)
    handler.setFormatter(Lines())
    loggers = [logging.getLogger(name) for name in LEVELS]
    before = [(one, one.handlers, one.propagate, one.level) for one in loggers]
    for one in loggers:
        one.handlers, one.propagate = [handler], False
        one.setLevel(LEVELS[one.name])
    shown = PROMPTS.level
    PROMPTS.setLevel(logging.INFO if prompts else logging.CRITICAL)
    try:
        yield
    finally:
        PROMPTS.setLevel(shown)
        for one, handlers, propagate, level in before:
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
