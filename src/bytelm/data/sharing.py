"""Work that processes share through a folder, on one machine or on many: each takes the next piece that nobody makes.

NAME-00007              a piece that is done, a file or a folder: it was made aside and published by one rename
NAME-00007.claim-0      who makes it; touched every few seconds. The highest number counts: taking over makes the next
NAME-00007.ID.tmp       the piece in the making

Claims are never removed by others, so that taking over is one exclusive creation. They only save work: a piece that two
processes make after all (one was asleep for minutes) has the same bytes from both, and the first one's stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from bytelm.data.corpus import Corpus
from bytelm.data.files import shown, sync_folder
from bytelm.errors import ResourceError

BEAT = 5.0  # seconds between touches of a claim
LOST = 120.0  # seconds without one after which a process on another machine counts as dead
SMALLEST, LARGEST = 1 << 20, 1 << 24  # bytes of a corpus whose boundaries or tokens are one piece
_PAUSE = 0.05, 2.0  # seconds between looks at what others do: the first, and the longest


class SharedWork:
    """Pieces of work in a folder; `finished` says that all of it was done, and the folder may be gone.

    `waiting` is called with the number of pieces done, every two seconds or more often while there is nothing to do but
    to wait for others. What it raises, as what a piece raises, ends this process's part: its claim is given back.
    """

    def __init__(self, folder: Path, finished: Callable[[], bool], waiting: Callable[[int], None]) -> None:
        self.folder = folder
        self._finished, self._waiting = finished, waiting
        self.done = 0
        """Pieces that were done when the one in hand was begun, by anybody."""
        self._watched: dict[str, tuple[int, float]] = {}  # claim → its last touch, and when we first read that

    def path(self, name: str, number: int) -> Path:
        """Where a piece is published."""
        return self.folder / f"{name}-{number:05d}"

    def do(self, name: str, count: int, make: Callable[[int, Path], None]) -> None:
        """Have all `count` pieces done: by others, or by `make`, called with a piece's number and where to make it.

        `make` must give the same bytes whoever calls it, and make them last (fsync). Raises what it raises, and
        ResourceError where the folder cannot be written.
        """
        pause = _PAUSE[0]
        while not self._finished():
            try:
                self.folder.mkdir(exist_ok=True)
                there = {path.name for path in self.folder.iterdir()}
            except FileNotFoundError:  # removed just now by who finished, or by who failed
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                continue
            missing = [n for n in range(count) if self.path(name, n).name not in there]
            if not missing:
                return
            self.done = count - len(missing)
            if self._made(name, missing, there, make):
                pause = _PAUSE[0]
            else:
                self._waiting(self.done)
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE[1])

    def _made(self, name: str, missing: list[int], there: set[str], make: Callable[[int, Path], None]) -> bool:
        """Make the first of the missing pieces that can be had; whether there was one."""
        for number, generation in self._free(name, missing, there):
            path = self.path(name, number)
            with contextlib.suppress(FileNotFoundError), _claimed(path, generation) as own:
                if own and not path.exists():
                    aside = path.with_name(f"{path.name}.{own}.tmp")
                    try:
                        make(number, aside)
                        _publish(aside, path)
                    except FileNotFoundError:
                        if not (path.exists() or self._finished()):  # else another was faster, and has tidied up
                            raise
                    finally:
                        remove(aside)
                    return True
                if own:
                    return True
        return False

    def _free(self, name: str, missing: list[int], there: set[str]) -> Iterator[tuple[int, int]]:
        """(piece, number of the claim to make) of those that nobody makes, then of those whose maker is dead."""
        claims: dict[str, int] = {}
        for file in there:
            base, dot, generation = file.rpartition(".claim-")
            if dot and generation.isdigit():
                claims[base] = max(int(generation), claims.get(base, 0))
        names = {number: self.path(name, number).name for number in missing}
        yield from ((number, 0) for number in missing if names[number] not in claims)
        for number in missing:
            last = claims.get(names[number])
            if last is not None and self._dead(claim := self.folder / f"{names[number]}.claim-{last}"):
                for aside in self.folder.glob(f"{names[number]}.{_owner(claim).get('id')}.tmp"):
                    if _known_dead(_owner(claim)):
                        remove(aside)
                yield number, last + 1

    def _dead(self, claim: Path) -> bool:
        """Whether who made a claim is gone: no longer running, or silent for `LOST` seconds of our own clock."""
        if _known_dead(_owner(claim)):
            return True
        stamp, now = _stamp(claim), time.monotonic()
        before = self._watched.get(claim.name)
        if stamp is None or before is None or before[0] != stamp:
            self._watched[claim.name] = (stamp or 0, now)
            return False
        return now - before[1] > LOST


def make_in_pieces(
    corpus: Corpus,
    result: Path,
    name: str,
    make: Callable[[int, int, Path, Callable[[int], None]], None],
    join: Callable[[list[Path]], None],
    progress: Callable[[int], None],
) -> None:
    """Have what is recorded of a corpus as the file `result`, made by all processes that call this, or found.

    `make` records the documents that begin from a position on and before another one, in a file of its own, and reports
    the bytes done; `join` puts the files of all pieces together, in order, and writes `result` last.
    """
    piece = min(max(corpus.total >> 8, SMALLEST), LARGEST)
    count = -(-corpus.total // piece)
    work = SharedWork(result.with_suffix(".pieces"), result.exists, lambda done: progress(done * piece))

    def one(number: int, aside: Path) -> None:
        before = work.done * piece
        make(number * piece, (number + 1) * piece, aside, lambda bytes: progress(min(before + bytes, corpus.total)))

    def last(number: int, aside: Path) -> None:
        join([work.path(name, number) for number in range(count)])
        shutil.rmtree(work.folder, ignore_errors=True)

    work.do(name, count, one)
    work.do("joined", 1, last)


def held_by(folder: Path) -> str | None:
    """Who is at work in such a folder, as far as can be known at once; None for nobody."""
    for claim in sorted(folder.glob("*.claim-*[0-9]")):
        owner, stamp = _owner(claim), _stamp(claim)
        # The clocks of two machines differ a little: a claim of the last minutes counts as a live one.
        recent = stamp is not None and abs(time.time() - stamp / 1e9) < LOST
        if recent and not _known_dead(owner):
            return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
    return None


@contextlib.contextmanager
def _claimed(path: Path, generation: int) -> Generator[str | None]:
    """Hold a claim on a piece; gives its owner's name for files, or None where another was faster."""
    claim = path.with_name(f"{path.name}.claim-{generation}")
    owner = _self()
    try:
        _create(claim, json.dumps(owner).encode())
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


def _create(claim: Path, owner: bytes) -> None:
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


def _publish(aside: Path, path: Path) -> None:
    """Give a finished piece its name, where it was not published meanwhile."""
    try:
        aside.rename(path)
    except OSError:
        if not path.exists():  # a folder does not replace one that is there
            raise
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _self() -> dict[str, Any]:
    return {
        "id": secrets.token_hex(8),
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _owner(claim: Path) -> dict[str, Any]:
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


def _known_dead(owner: dict[str, Any]) -> bool:
    """Whether the process is one of this machine that has ended."""
    if owner.get("machine") != _machine() or not isinstance(pid := owner.get("pid"), int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _started(pid) != owner.get("started")


def _machine() -> str:
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
