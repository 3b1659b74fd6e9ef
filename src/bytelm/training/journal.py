"""Logging of a run: metrics.jsonl for machines, one live progress line for people."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

from bytelm.checkpoint.metrics import read_metrics
from bytelm.data.files import shown, write_whole
from bytelm.errors import ResourceError
from bytelm.training.loggers import Loggers

PLAIN_SECONDS = 10.0  # between lines without a terminal


class Journal:
    """`metrics.jsonl`, one JSON object per line, and a progress line on standard error.

    Every line has "kind" ("train", "validation", "sample", "skipped", ...), "step", "bytes", and "seconds", in
    steps alone. Lines that a resumed run will write again are truncated first, so that no step is logged twice.
    "phase" is wall-clock time by phase: a "name" and its "duration" in seconds.
    """

    def __init__(
        self, path: Path | None, quiet: bool = False, stream: TextIO | None = None, prefix: str = "", mute: bool = False
    ) -> None:
        self.path = path
        """None where nothing is kept: progress alone is shown."""
        self.quiet = quiet or mute
        self.mute = mute
        """Nothing is written: another process of the team does."""
        self.prefix = prefix
        self.stream = stream or sys.stderr or io.StringIO()  # stderr may have been closed before the start
        self.live = self.stream.isatty()
        self.width = 0
        self.shown = 0.0
        self.loggers: Loggers | None = None
        """Also called with each line that `write` writes."""

    def beside(self, path: Path, prefix: str) -> Journal:
        """A journal of its own file for a part of the run, heard and shown where this one is."""
        return Journal(path, self.quiet, self.stream, prefix, self.mute)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of earlier sessions, some of which a resumed run may write again."""
        return [] if self.path is None else read_metrics(self.path)

    def truncate_after(self, step: int) -> None:
        """Truncate lines of later steps, and a partial line after a crash."""
        if self.mute or self.path is None or not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line. Raises ResourceError if it cannot be written."""
        if self.mute or self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **fields}) + "\n")
        except OSError as error:
            raise ResourceError(
                f"cannot write {shown(str(self.path))} ({error.strerror}): make room there, then run again to resume"
            ) from error
        if self.loggers is not None:
            self.loggers.write(kind, fields)

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Log the duration of a phase before the first step, if it completes."""
        began = time.monotonic()
        yield
        self.write("phase", step=0, bytes=0, seconds=0.0, name=name, duration=time.monotonic() - began)

    def say(self, line: str) -> None:
        """Print a permanent line."""
        if self.quiet:
            return
        if self.live and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.width = 0
        self._put(self.prefix + line + "\n")

    def progress(self, line: str, force: bool = False) -> None:
        """Print a line that the next one replaces; without a terminal, one every few seconds."""
        if self.quiet:
            return
        line = self.prefix + line
        if self.live:
            self._put("\r" + line.ljust(self.width))
            self.width = len(line)
        elif force or time.monotonic() - self.shown >= PLAIN_SECONDS:
            self.shown = time.monotonic()
            self._put(line + "\n")

    def _put(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.quiet = True  # stderr was closed; continue silently
