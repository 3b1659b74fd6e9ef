"""What a client receives from an OpenAI-compatible server: events, their bytes, and when."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")  # a carriage return that comes last may be half of a line's end


@dataclass
class Answer:
    """One request and what came back."""

    index: int
    arrival: float
    """When it was due; `sent` is when it was sent."""
    sent: float
    end: float | None = None
    """None: still in progress when the measurement ended."""
    status: int | None = None
    """Of HTTP; None if there was no answer."""
    error: str = ""
    """Why there is no whole answer: a status as in "429", or "connection", "timeout", "cut off", "malformed", ..."""
    retry_after: float | None = None
    """Seconds."""
    pieces: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """Time and bytes of each event that has bytes."""
    data: bytearray = field(default_factory=bytearray)
    """The text in UTF-8, or the exact bytes of a server that gives them."""
    tokens: int | None = None
    """As the server counts them; None if it does not say."""
    streamed: bool = False
    finished: bool = False
    """Whether a finish reason or the end of the stream was received."""

    @property
    def complete(self) -> bool:
        """Whether it is a whole answer."""
        return self.end is not None and not self.error

    @property
    def per_byte(self) -> float | None:
        """Mean seconds per byte after the first event; None without a second one."""
        if not self.streamed or len(self.pieces) < 2:
            return None
        (first, count), (last, _) = self.pieces[0], self.pieces[-1]
        return (last - first) / (len(self.data) - count)

    def take(self, text: str, now: float) -> None:
        """Read one event's data, or a whole answer in JSON."""
        if text.strip() == "[DONE]":
            self.finished = True
            return
        try:
            value = json.loads(text)
            if value.get("error"):
                self.error = self.error or "error event"
                return
            data = b"".join(data_of(choice) for choice in value.get("choices") or ())
            self.finished |= any(choice.get("finish_reason") for choice in value.get("choices") or ())
            tokens = (value.get("usage") or {}).get("completion_tokens")
            self.tokens = self.tokens if tokens is None else int(tokens)
        except (ValueError, TypeError, AttributeError):
            self.error = self.error or "malformed"
            return
        if data:
            self.pieces.append((now, len(data)))
            self.data += data


def data_of(choice: Mapping[str, Any]) -> bytes:
    """The bytes of one choice of an answer or event: `bytes_b64` if the server gives it, else the text in UTF-8."""
    places: list[Mapping[str, Any]] = [choice, choice.get("delta") or {}, choice.get("message") or {}]
    for place in places:
        if place.get("bytes_b64") is not None:
            return base64.b64decode(place["bytes_b64"])
    texts = [place.get(name) for place in places for name in ("text", "content")]
    return "".join(text for text in texts if text).encode(errors="surrogatepass")


class Events:
    """Server-sent events from a stream of bytes, in whatever pieces it comes: the data of each event.

    Comments and other fields are skipped; lines may end with \\n, \\r\\n or \\r; several lines of data are joined; an
    event that the end of the stream leaves open counts.
    """

    def __init__(self) -> None:
        self.rest = b""
        self.data: list[bytes] = []

    def feed(self, received: bytes) -> list[str]:
        """The events that end in these bytes."""
        *lines, self.rest = LINE_END.split(self.rest + received)
        return [event for line in lines for event in self._line(line)]

    def close(self) -> list[str]:
        """What the end of the stream leaves open."""
        rest, self.rest = self.rest.rstrip(b"\r"), b""
        return [event for line in (rest, b"") for event in self._line(line)]

    def _line(self, line: bytes) -> list[str]:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self.data.append(value.removeprefix(b" "))
            return []
        event, self.data = b"\n".join(self.data), []
        return [event.decode(errors="replace")] if event else []


def seconds_of(header: str | None) -> float | None:
    """Retry-After in seconds; None for none, or for a date."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        return None
