"""What learns while a model is read, for commands: `--online`, `--dynamic`; and what builds a run's memory: prime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from bytelm.cli.common import Json, Quiet, counter, print_json
from bytelm.cli.resuming import resuming
from bytelm.errors import UsageError
from bytelm.units import show_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bytelm.evaluate.dynamic import Dynamic
    from bytelm.interfaces.model import ByteModel
    from bytelm.online.memory import Memory

Kind = Literal["cold", "primed"]
Online = Annotated[
    Kind | None,
    Parameter(
        help="A memory that learns the bytes beside the model: cold begins empty, primed has read the run's training "
        "split (bytelm prime)."
    ),
]
Learning = Annotated[
    Literal["head", "tables", "all"] | None,
    Parameter(
        help="Dynamic evaluation: a copy of the model whose weights learn each window after it was scored: those of "
        "the output layer (head), of n-gram tables and the output layer (tables), or all."
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Learners:
    """What learns while the model is read, beside it or in its place."""

    online: Online = None
    dynamic: Learning = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that are given, by name, as on the command line."""
        named = {"online": self.online, "dynamic": self.dynamic}
        return {name: value for name, value in named.items() if value is not None}

    def memory(self, run: Path, files: Sequence[tuple[str, bytes | NDArray[np.uint8]]] = ()) -> Memory | None:
        """See `opened`; one that begins empty suits the files that are measured, as that of `compress` does."""
        if self.online != "cold" or not files:
            return opened(run, self.online)
        from bytelm.online.kinds import SAMPLE, for_file
        from bytelm.online.memory import Memory

        first = bytearray()
        for _, data in files:
            first += bytes(data[: SAMPLE - len(first)])
        return Memory(for_file(bytes(first), sum(len(data) for _, data in files)))

    def copy(self, model: ByteModel) -> Dynamic | None:
        """The copy of a model that learns. Raises UsageError for one that cannot."""
        from bytelm.evaluate.dynamic import Dynamic

        return None if self.dynamic is None else Dynamic(model, self.dynamic)


def opened(run: Path, online: Kind | None) -> Memory | None:
    """The memory that `--online` asks for. Raises UsageError and CheckpointError."""
    if online is None:
        return None
    from bytelm.online import saved

    return saved.opened(run, online)


def beside(run: Path, online: Kind | None) -> dict[str, Any]:
    """The options of generation that are memories: the one that predicts beside the model, and the one that drafts."""
    from bytelm.online.saved import reader

    return {"online": opened(run, online), "read_before": reader(run)}


def prime(run: Path, /, *, memory: float | None = None, quiet: Quiet = False, json: Json = False) -> int:
    """Build the memory of a run: it reads the training split once and is saved in the run, for --online primed.

    After Ctrl-C the same command continues.

    Example: bytelm prime runs/demo

    Parameters
    ----------
    run
        A run whose packed training data is still there.
    memory
        Its size in MiB; the file is about as large (default: 64 bytes for each training byte, 128 MiB to 1 GiB).
    """
    from bytelm.compress.sides import State
    from bytelm.data.corpora import open_corpus
    from bytelm.online.kinds import kind_of, memory_for
    from bytelm.online.memory import Memory
    from bytelm.online.saved import FILE, for_training, home, unread
    from bytelm.online.settings import LARGEST, SMALLEST, Settings

    if memory is not None and not SMALLEST <= memory * 2**20 <= LARGEST:
        raise UsageError(f"--memory {memory:g}: must be from {SMALLEST >> 20} to {LARGEST >> 20} MiB")
    file = home(run) / FILE
    corpus = open_corpus(home(run) / "data")
    total = corpus.bytes("train")
    size = memory_for(total) if memory is None else round(memory * 2**20)
    made = Memory(for_training(corpus, Settings(memory=size)))
    progress = counter("learning", total, quiet or json)
    with resuming("prime", file, total, "prime a copy of the run") as (resume, _):
        if (found := resume.begin(f"{corpus.fingerprint} {made.settings}")) is not None:
            made.state[:] = found[1].arrays["memory"]
            del found  # as large as the memory
            if progress:
                progress(made.read_bytes)
        for piece in unread(corpus, made.read_bytes):
            made.learn(piece)
            if progress:
                progress(len(piece))
            if made.read_bytes < total:
                resume.at(made.read_bytes, made.read_bytes, lambda: State(arrays={"memory": made.state}))
        made.save(file)
    kind = kind_of(made.settings)
    if json:
        print_json({"file": str(file), "bytes": made.bytes, "read_bytes": made.read_bytes, "kind": kind})
    else:
        print(f"{file}: {show_bytes(made.bytes)}, for {kind}; {made.read_bytes:,} bytes read")
    return 0
