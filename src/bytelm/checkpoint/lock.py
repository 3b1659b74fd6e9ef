"""Lock of a run directory: one job at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TextIO

from bytelm.errors import ResourceError

_PAUSE = 1.0  # seconds between tries


@contextlib.contextmanager
def exclusive(run: Path, waiting: Callable[[str], None] | None = None) -> Generator[None]:
    """Hold `run/lock` for the length of a `with` block.

    `waiting` is called with who holds it, every second while another job does; without it, that is an error. The system
    releases it when the process ends, however it ends, so that no lock is ever stale; the file stays, and names its
    last holder. Raises ResourceError naming the job that holds it, or saying why it cannot be taken.
    """
    file = run / "lock"
    try:
        stream = file.open("a+", encoding="utf-8")  # not "w": it names the holder
    except OSError as error:
        raise ResourceError(f"cannot open {file}: {error.strerror}; name a run that can be written") from error
    with stream:
        while (holder := _take(run, stream)) is not None:
            if waiting is None:
                raise ResourceError(f"{run} is in use by {holder}: wait for it, stop it, or name another run")
            waiting(holder)
            time.sleep(_PAUSE)
        yield


def _take(run: Path, stream: TextIO) -> str | None:
    """Take the lock; or who holds it."""
    try:
        import fcntl  # not on Windows, where this module must still import
    except ImportError as error:
        raise ResourceError(f"cannot lock {run}: this system has no fcntl; use Linux, macOS or WSL") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        stream.flush()
    except BlockingIOError:
        stream.seek(0)
        return stream.read().strip() or "another process"
    except OSError as error:
        raise ResourceError(f"cannot lock {stream.name}: {error.strerror}; name a run on another disk") from error
    return None
