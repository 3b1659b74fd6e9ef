"""Claims: which process does which piece of work, among processes that share a folder, on one machine or on many.

NAME.claim-0            who does it; touched every few seconds. The highest number counts: taking over makes the next

Claims are never removed by others, so that taking over is one exclusive creation. They only save work: what is claimed
may be done twice after all (one process was asleep for minutes).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any

from bytelm.data.files import shown
from bytelm.errors import ResourceError

BEAT = 5.0  # seconds between touches of a claim
LOST = 120.0  # seconds without one after which a process on another machine counts as dead


class Claims:
    """The claims in a folder, as one process sees them over time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._watched: dict[str, tuple[int, float]] = {}  # claim → its last touch, and when we first read that

    def free(self, names: Collection[str], there: Collection[str]) -> Iterator[tuple[str, int]]:
        """(name, number of the claim to make) of those that nobody does, then of those whose process is dead.

        `there`: the names of the files in the folder.
        """
        claims: dict[str, int] = {}
        for file in there:
            base, dot, generation = file.rpartition(".claim-")
            if dot and generation.isdigit():
                claims[base] = max(int(generation), claims.get(base, 0))
        yield from ((name, 0) for name in names if name not in claims)
        for name in names:
            last = claims.get(name)
            if last is not None and self._dead(self.folder / f"{name}.claim-{last}"):
                yield name, last + 1

    def _dead(self, claim: Path) -> bool:
        """Whether who made a claim is gone: no longer running, or silent for `LOST` seconds of our own clock."""
        if known_dead(owner_of(claim)):
            return True
        stamp, now = _stamp(claim), time.monotonic()
        before = self._watched.get(claim.name)
        if stamp is None or before is None or before[0] != stamp:
            self._watched[claim.name] = (stamp or 0, now)
            return False
        return now - before[1] > LOST


def held_by(folder: Path) -> str | None:
    """Who is at work in such a folder, as far as can be known at once; None for nobody."""
    for claim in sorted(folder.glob("*.claim-*[0-9]")):
        owner, stamp = owner_of(claim), _stamp(claim)
        # The clocks of two machines differ a little: a claim of the last minutes counts as a live one.
        recent = stamp is not None and abs(time.time() - stamp / 1e9) < LOST
        if recent and not known_dead(owner):
            return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
    return None


@contextlib.contextmanager
def claimed(path: Path, generation: int) -> Generator[str | None]:
    """Hold a claim on a piece; gives its owner's name for files, or None where another was faster."""
    claim = path.with_name(f"{path.name}.claim-{generation}")
    owner = _self()
    try:
        create(claim, json.dumps(owner).encode())
    except FileExistsError:
        yield None
        return
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ResourceError(
            f"cannot write {shown(str(claim))} ({error.strerror}): make room there, or name another place"
        ) from error
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(claim)

    beating = threading.Thread(target=beat, daemon=True, name="claim")
    beating.start()
    try:
        yield owner["id"]
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError):
            claim.unlink()


def create(claim: Path, owner: bytes) -> None:
    """Make a claim that is not there, with who made it in it: nobody sees one without, whenever this process ends.

    Raises FileExistsError where it is there, and other OSErrors. A disk that knows no links has it empty for a moment.
    """
    aside = claim.with_name(f"{claim.name}.{secrets.token_hex(8)}.tmp")
    try:
        aside.write_bytes(owner)
        try:
            os.link(aside, claim)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:
            with claim.open("xb") as file:
                file.write(owner)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _self() -> dict[str, Any]:
    return {
        "id": secrets.token_hex(8),
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def owner_of(claim: Path) -> dict[str, Any]:
    """Who made a claim; nothing where that is not (or not yet) written."""
    with contextlib.suppress(OSError, ValueError):
        found: Any = json.loads(claim.read_bytes())
        if isinstance(found, dict):
            return found  # pyright: ignore[reportUnknownVariableType]
    return {}


def _stamp(claim: Path) -> int | None:
    """When a claim was touched, by the clock of whoever keeps the folder; opened, so that a network disk is asked."""
    try:
        with claim.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def known_dead(owner: dict[str, Any]) -> bool:
    """Whether the process is one of this machine that has ended."""
    if owner.get("machine") != machine() or not isinstance(pid := owner.get("pid"), int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _started(pid) != owner.get("started")


def machine() -> str:
    """What two processes share that see each other's numbers: the boot of a system, and a space of numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process started, so that another one of its number is told from it; None for a dead one, or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
