"""Lock of a run directory: one job at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import TextIO

from bytelm.errors import ResourceError


@contextlib.contextmanager
def exclusive(run: Path) -> Generator[None]:
    """Hold `run/lock` for the length of a `with` block.

    The system releases it when the process ends, however it ends, so that no lock is ever stale; the file stays, and
    names its last holder. Raises ResourceError naming the job that holds it, or saying why it cannot be taken.
    """
    file = run / "lock"
    try:
        stream = file.open("a+", encoding="utf-8")  # not "w": it names the holder
    except OSError as error:
        raise ResourceError(f"cannot open {file}: {error.strerror}; name a run that can be written") from error
    with stream:
        _take(run, stream)
        yield


def _take(run: Path, stream: TextIO) -> None:
    try:
        import fcntl  # not on Windows, where this module must still import
    except ImportError as error:
        raise ResourceError(f"cannot lock {run}: this system has no fcntl; use Linux, macOS or WSL") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        stream.flush()
    except BlockingIOError as error:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        raise ResourceError(f"{run} is in use by {holder}: wait for it, stop it, or name another run") from error
    except OSError as error:
        raise ResourceError(f"cannot lock {stream.name}: {error.strerror}; name a run on another disk") from error
