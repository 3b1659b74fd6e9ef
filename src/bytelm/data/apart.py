"""Parquet files are read in a separate process, so that damage that crashes pyarrow does not crash ours.

    texts ── the file, and how to read it ──▶ serve ──▶ parquet.texts
      ◀── a frame for each row, and what it came to: the bad rows, or the error

A frame is its size and so many bytes; the size -1 stands before the last one, which is JSON. The process serves one
file after another, and ends when this one does or asks for nothing for a minute.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from io import BufferedIOBase
from typing import Any

from bytelm.data import parquet
from bytelm.data.decode import in_pieces
from bytelm.data.report import SourceReport
from bytelm.errors import DataError, MissingExtraError

_SIZE = struct.Struct("<q")
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from bytelm.data.apart import serve; serve()"
_REQUEST = 1 << 16  # bytes, of names
_IDLE = 60.0  # seconds that a process waits for another file
_idle: list[_Process] = []


def texts(
    file: BufferedIOBase, name: str, text_field: str, report: SourceReport, max_bad: float
) -> Iterator[Iterator[bytes]]:
    """What `parquet.texts` gives and raises; where its process ends, DataError says how."""
    if find_spec("pyarrow") is None:
        raise MissingExtraError("pyarrow", "data", f"reading {name}")
    process = _idle.pop() if _idle else _Process()
    process = process if process.usable() else _Process()
    try:
        process.ask(file, name, text_field, max_bad)
        while (size := process.size()) >= 0:
            yield in_pieces([process.read(size)])
        end = json.loads(process.read(process.size()))
    except (EOFError, ConnectionError) as error:
        raise DataError(
            f"{name} cannot be read as a Parquet file (it crashed the reader: {process.how_it_ended()}): "
            "get a complete copy"
        ) from error
    process.since = time.monotonic()
    _idle.append(process)
    report.bad += end["bad"]
    if end["error"]:
        raise DataError(end["error"])


class _Process:
    """A process that reads, and the line to it. It is ended when it is let go."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.since = time.monotonic()
        """When it was last done with a file."""
        self._line, theirs = socket.socketpair()
        self._stream = self._line.makefile("rb")
        with theirs:
            words = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno())]
            # In a session of its own, since Ctrl-C is meant for us; and of what a library says at its end we say more.
            silent: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()], start_new_session=True, **silent)
        weakref.finalize(self, _end, self._process, self._line, self._stream)

    def usable(self) -> bool:
        """Whether it surely waits still, and this is no fork of who started it: two may not talk to it."""
        return self.owner == os.getpid() and time.monotonic() - self.since < _IDLE / 2

    def ask(self, file: BufferedIOBase, *how: Any) -> None:
        """Have a file read. Raises ConnectionError where the process has ended."""
        socket.send_fds(self._line, [json.dumps(how).encode()], [file.fileno()])

    def size(self) -> int:
        """The size of the next frame. Raises EOFError where the process has ended."""
        return _SIZE.unpack(self.read(_SIZE.size))[0]

    def read(self, size: int) -> bytes:
        """So many bytes. Raises EOFError where the process has ended, or ConnectionError."""
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def how_it_ended(self) -> str:
        """The signal or the exit code of a process that has closed the line."""
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(process: subprocess.Popen[Any], line: socket.socket, stream: Any) -> None:
    stream.close()
    line.close()
    process.kill()
    process.wait()


def serve() -> None:
    """Read files for the process at the other end of the line, until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # what they ask for is for the other process to do
    with socket.fromfd(int(sys.argv[2]), socket.AF_UNIX, socket.SOCK_STREAM) as line, line.makefile("wb") as stream:
        while select.select([line], [], [], _IDLE)[0]:
            request, descriptors, _, _ = socket.recv_fds(line, _REQUEST, 1)
            if not request:
                return
            name, text_field, max_bad = json.loads(request)
            report, error = SourceReport(), ""
            try:
                with os.fdopen(descriptors[0], "rb") as file:
                    for row in parquet.texts(file, name, text_field, report, max_bad):
                        data = b"".join(row)
                        stream.write(_SIZE.pack(len(data)) + data)
            except DataError as raised:
                error = str(raised)
            last = json.dumps({"bad": report.bad, "error": error}).encode()
            stream.write(_SIZE.pack(-1) + _SIZE.pack(len(last)) + last)
            stream.flush()
