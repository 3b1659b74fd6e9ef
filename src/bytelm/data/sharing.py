"""Work that processes share through a folder, on one machine or on many: each takes the next piece that nobody makes.

NAME-00007              a piece that is done, a file or a folder: it was made aside and published by one rename
NAME-00007.claim-0      who makes it; touched every few seconds. The highest number counts: taking over makes the next
NAME-00007.ID.tmp       the piece in the making

Claims are never removed by others, so that taking over is one exclusive creation. They only save work: a piece that two
processes make after all (one was asleep for minutes) has the same bytes from both, and the first one's stays.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from bytelm.data.claims import Claims, claimed, known_dead, owner_of
from bytelm.data.corpus import Corpus
from bytelm.data.files import sync_folder

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
        self._claims = Claims(folder)

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
        numbers = {self.path(name, number).name: number for number in missing}
        for piece, generation in self._claims.free(numbers, there):
            number, path = numbers[piece], self.folder / piece
            if generation:
                self._tidy(piece, generation - 1)
            with contextlib.suppress(FileNotFoundError), claimed(path, generation) as own:
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

    def _tidy(self, piece: str, last: int) -> None:
        """Remove what a dead process of this machine left half made."""
        owner = owner_of(self.folder / f"{piece}.claim-{last}")
        if known_dead(owner):
            for aside in self.folder.glob(f"{piece}.{owner.get('id')}.tmp"):
                remove(aside)


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
