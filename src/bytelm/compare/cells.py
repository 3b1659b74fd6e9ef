"""Trainings, each in a process of its own. Any number of commands share them, on one machine or on many.

HOME/cells/NAME.claim-0     which command trains the cell NAME (`data.claims`)
RUN/result.json             a cell that is done, as its process wrote it
RUN/failed.json             one that failed: why, and whether it diverged; the next command tries it again

A command takes the first cell that nobody trains, then those of commands that died, which go on from their checkpoints;
when all are taken it waits for the others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.checkpoint import store
from bytelm.data.claims import Claims, claimed
from bytelm.data.files import write_whole
from bytelm.errors import BytelmError, DivergenceError, ResourceError
from bytelm.training.journal import Journal
from bytelm.training.stop import Interrupted, StopRequest
from bytelm.units import UNIFORM

CELLS, RESULT, FAILED = "cells", "result.json", "failed.json"
_PAUSE = 1.0  # seconds between looks at what others train


@dataclass(frozen=True)
class Cell:
    """One training. `worker`: the module that trains it, run with `job` as JSON, to which "run" is added."""

    name: str
    label: str
    run: Path
    data: Path
    worker: str
    job: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Files that are copied into the run under these names, where they exist."""

    @property
    def done(self) -> bool:
        """Whether it has a result."""
        return (self.run / RESULT).exists()

    @property
    def result(self) -> dict[str, Any]:
        """What its process wrote."""
        return json.loads((self.run / RESULT).read_bytes())

    @property
    def failure(self) -> Failure | None:
        """Why it failed, if it did; None for one that is done after all."""
        path = self.run / FAILED
        return None if self.done or not path.exists() else Failure(**json.loads(path.read_bytes()))


@dataclass(frozen=True)
class Failure:
    """Why a training came to no end."""

    reason: str
    diverged: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """That of an error."""
        said = str(error) if isinstance(error, BytelmError) else f"{type(error).__name__}: {error}"
        return cls(said, isinstance(error, DivergenceError))

    @classmethod
    def of_bits(cls, bits: float) -> Failure | None:
        """That of a training that ended no better than a guess, or with what is not a number; None for any other."""
        if bits < UNIFORM:
            return None
        return cls(f"{bits:.3g} bits per byte, where guessing takes {UNIFORM:g}", diverged=True)

    def write(self, run: Path) -> None:
        """Keep it in the run."""
        write_whole(run / FAILED, json.dumps({"reason": self.reason, "diverged": self.diverged}).encode())


def work_off(cells: Sequence[Cell], home: Path, journal: Journal) -> None:
    """Have all cells trained, by this command or by others. Raises Interrupted; cells that fail are passed over."""
    claims = Claims(home / CELLS)
    claims.folder.mkdir(exist_ok=True)
    earlier = {cell.name: _stamp(cell) for cell in cells}  # failures before this command: they are tried again
    tried = set[str]()

    def open_cells() -> dict[str, Cell]:
        return {
            cell.name: cell
            for cell in cells
            if not (cell.done or cell.name in tried or _stamp(cell) not in (None, earlier[cell.name]))
        }

    while left := open_cells():
        StopRequest.check()
        there = {path.name for path in claims.folder.iterdir()}
        free = claims.free(left, there)
        if not any(_taken(claims, left[name], generation, journal, tried) for name, generation in free):
            journal.progress(f"waiting for {len(left)} trainings of other commands")
            time.sleep(_PAUSE)


def _taken(claims: Claims, cell: Cell, generation: int, journal: Journal, tried: set[str]) -> bool:
    """Train a cell if no other command was faster; whether it is settled."""
    with claimed(claims.folder / cell.name, generation) as own:
        if not own:
            return False
        tried.add(cell.name)
        if not cell.done:
            journal.say(f"{cell.label}:")
            trained(cell)
    return True


def _stamp(cell: Cell) -> int | None:
    """When a cell failed."""
    try:
        return (cell.run / FAILED).stat().st_mtime_ns
    except OSError:
        return None


def trained(cell: Cell) -> None:
    """Train a cell in a separate process. Raises Interrupted by a signal; a failure is kept in its run."""
    run = cell.run
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "data").exists():
        (run / "data").symlink_to(os.path.relpath(cell.data, run))
    for name, file in cell.files.items():
        if file.exists():
            shutil.copyfile(file, run / name)
    command = [sys.executable, "-m", cell.worker, json.dumps({**cell.job, "run": str(run)})]
    (run / FAILED).unlink(missing_ok=True)
    with StopRequest() as stop:
        # In a separate process group, so that Ctrl-C reaches only this process, which forwards it once.
        process = subprocess.Popen(command, start_new_session=True)
        forwarded = False
        while process.poll() is None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop.received is not None and not forwarded:
                    process.send_signal(stop.received)
                    forwarded = True
        if stop.received is not None:
            raise Interrupted(stop.received)
    if process.returncode and not (run / FAILED).exists():
        Failure(died(process.returncode)).write(run)


def settle(run: Path, written: Mapping[str, Any]) -> None:
    """Write the result of a training that is over. Of its checkpoints the last weights stay: a study has hundreds."""
    write_whole(run / RESULT, json.dumps(written).encode())
    store.keep_weights(run)


def answered(job: str, work: Callable[..., int]) -> int:
    """Do a job in its own process: `work` with its arguments. A failure is kept in its run; its exit code tells."""
    given = json.loads(job)
    given |= {key: Path(given[key]) for key in ("home", "root", "run") if key in given}
    try:
        return work(**given)
    except Exception as error:
        Failure.of(error).write(given["run"])
        if isinstance(error, BytelmError):
            return error.exit_code
        raise


def made(home: Path) -> None:
    """Make the folder of a comparison or a sweep. Raises ResourceError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {home} ({error.strerror}): choose another place with --run") from error


def waiting(journal: Journal, what: str) -> Callable[[str], None]:
    """What is called with the holder of the lock while another command prepares: it shows that; a signal ends it."""

    def wait(holder: str) -> None:
        StopRequest.check()
        journal.progress(f"waiting for {holder}, which prepares the {what}")

    return wait


def died(code: int) -> str:
    """Why a process ended that left no word."""
    return f"it was killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"
