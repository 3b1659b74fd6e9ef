"""Commands whose work goes on after Ctrl-C, or a crash, when they are given again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bytelm.units import show_bytes

if TYPE_CHECKING:
    from bytelm.compress.resume import Resume
    from bytelm.data.files import PositionWriter

STATE, PARTIAL = ".state", ".partial"  # after the name of the output


@contextmanager
def resuming(command: str, out: Path, total: int, way_out: str) -> Generator[tuple[Resume, PositionWriter]]:
    """Work of a command on `total` bytes whose output is `out`: its state is kept beside that until the work is done.

    So is a file for what is written as it is found. It is there, maybe empty, while the work is done, and locked: the
    same output is no other command's. `way_out`: what errors say to do where that cannot be.

    Raises Interrupted once the state is saved after a signal.
    """
    from bytelm.compress.resume import Resume, Stopped
    from bytelm.data.files import PositionWriter, clear_asides
    from bytelm.training.stop import Interrupted, StopRequest

    partial = PositionWriter(out.with_name(out.name + PARTIAL), total, way_out)
    with closing(partial), StopRequest() as request:
        state = out.with_name(out.name + STATE)
        resume = Resume(state, lambda: request.received is not None, command=command)
        for path in (out, state):
            clear_asides(path)  # of one that was killed
        try:
            yield resume, partial
            resume.end()
        except GeneratorExit:  # at the interpreter's end names of modules may be gone
            raise
        except Stopped as stopped:
            done = f"{show_bytes(stopped.done)} of {show_bytes(total)}"
            raise Interrupted(
                request.received or 0, f"{done} are done, {resume.path} has the state: the same command continues"
            ) from None
        finally:
            if partial.empty or not resume.path.exists():
                partial.delete()
