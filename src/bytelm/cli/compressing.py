"""The commands of lossless compression: compress, decompress."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bytelm.cli.common import Json, Quiet, Stream, Tables, Weights, counter, is_stdin, print_json
from bytelm.cli.online import Kind, Online, opened
from bytelm.cli.resuming import STATE, resuming
from bytelm.errors import CheckpointError, DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from bytelm.compress.windows import Source
    from bytelm.interfaces.model import ByteModel
    from bytelm.online.memory import Memory

Out = Annotated[Stream | None, Parameter(name=("--out", "-o"), validator=())]
Streams = Annotated[
    int | None,
    Parameter(
        help="Parts of the file that are read in parallel, up to 64 (default: 8 of a long file, 1 with --online). "
        "More are decompressed faster; with --online they are larger, as each has a separate memory."
    ),
]
SUFFIX = ".blm"
ELSEWHERE = "choose another place with --out"


def compress(
    run: Path,
    file: Stream,
    /,
    *,
    out: Out = None,
    online: Online = None,
    streams: Streams = None,
    weights: Weights = None,
    tables: Tables = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Compress a file with a model, losslessly, to about the bits per byte of `bytelm eval`.

    After Ctrl-C the same command continues, to the same file, bit for bit.

    Example: bytelm compress runs/demo notes.txt

    Parameters
    ----------
    run
        A run, or one checkpoint of it; decompression needs the same.
    file
        The file to compress, or - for standard input.
    out
        The file to write, or - for standard output (default: FILE.blm, or - if FILE is -).
    """
    from bytelm.compress.stream import encode
    from bytelm.lm import load
    from bytelm.online.kinds import kind_of

    out = new(out or (file if is_stdin(file) else Path(f"{file}{SUFFIX}")), json)
    if is_stdin(out) and sys.stdout.isatty():
        raise UsageError("compressed data is not written to a terminal: name a file with --out")
    source, size = given(file)
    lm = load(run, weights=weights, tables=tables, watch=partial(counter, quiet=quiet or json))
    memory = beginning(run, online, source, size // (streams or 1))
    progress = counter("compressing", size, quiet or json)
    with nullcontext((None, None)) if is_stdin(out) else resuming("compress", out, size, ELSEWHERE) as (resume, _):
        new(out)  # again: another command may have written it before this one had it
        packed = encode(lm.model, source, size, lm.context, progress, memory, streams, resume)
        write(out, packed)
    sizes, bits = by_others(source, size), 8 * len(packed) / size
    others = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    kind = None if memory is None else kind_of(memory.settings)
    beside = f" with an online memory for {kind}" if kind else ""
    line = f"{size:,} → {len(packed):,} bytes, {bits:.3f} bits/byte{beside}{others and '; '}{others}"
    tell(out, line, {"from": size, "bytes": len(packed), "bits_per_byte": bits, "online": kind, **sizes}, quiet, json)
    return 0


def by_others(source: Source, size: int) -> dict[str, int]:
    """The bytes that other compressors make of a file, by name; none where it has changed, and a line that says so."""
    from bytelm.compress.windows import pieces
    from bytelm.evaluate.compressors import compressed

    try:
        found = {name: round(bits * size / 8) for name, bits in compressed([pieces(source, size)]).items()}
        source.check()
    except DataError as error:  # what was compressed is written, and was checked
        print(f"not compared with gzip, bzip2 and xz: {error}", file=sys.stderr)
        return {}
    return found


def decompress(
    run: Path,
    file: Stream,
    /,
    *,
    out: Out = None,
    weights: Weights = None,
    tables: Tables = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Restore a file that was compressed with the same model, in the same precision.

    After Ctrl-C the same command continues.

    Example: bytelm decompress runs/demo notes.txt.blm --out notes.txt

    Parameters
    ----------
    run
        The run that compressed it.
    file
        A file written by compress, or - for standard input.
    out
        The file to write, or - for standard output (default: FILE without .blm, or - if FILE is -).
    """
    from bytelm.compress.header import opened as header_of
    from bytelm.compress.stream import decompress as unpack
    from bytelm.lm import load
    from bytelm.online.memory import Memory

    if out is None and file.suffix != SUFFIX and not is_stdin(file):
        raise UsageError(f"{file} does not end in {SUFFIX}: name the file to write with --out")
    out = new(out or (file if is_stdin(file) else file.with_suffix("")), json)
    packed, lm = read(file), load(run, weights=weights, tables=tables, watch=partial(counter, quiet=quiet or json))
    try:
        header, _ = header_of(lm.model, packed)
        memory = Memory(header.settings) if header.online == "cold" else opened(run, header.online)
        progress = counter("decompressing", header.size, quiet or json)
        if is_stdin(out):
            write(out, unpack(lm.model, packed, progress, memory))
        else:
            restore(lm.model, packed, header.size, out, progress, memory)
    except DataError as error:
        raise DataError(f"{named(file)}: {error}") from None
    line, sizes = f"{len(packed):,} → {header.size:,} bytes", {"from": len(packed), "bytes": header.size}
    tell(out, line, sizes, quiet, json)
    return 0


def beginning(run: Path, online: Kind | None, source: Source, size: int) -> Memory | None:
    """The memory that `--online` asks for; an empty one suits the file, `size` bytes of which each stream reads."""
    import numpy as np

    from bytelm.online.kinds import SAMPLE, for_file
    from bytelm.online.memory import Memory

    if online != "cold":
        return opened(run, online)
    first = np.empty(min(size, SAMPLE), np.uint8)
    source.read_into(0, first)
    return Memory(for_file(first, size))


def restore(
    model: ByteModel, packed: bytes, size: int, out: Path, progress: Callable[[int], None] | None, memory: Memory | None
) -> None:
    """Decompress to a file, which has its name once it is whole."""
    from bytelm.compress.stream import decode

    with resuming("decompress", out, size, ELSEWHERE) as (resume, partial):
        new(out)  # again, as for compress
        if partial.empty and resume.found():
            raise CheckpointError(f"{partial.path}, of {resume.path}, is missing: delete the state to start over")
        try:
            decode(model, packed, partial, progress, memory, resume)
        except DataError:
            if resume.begun:  # otherwise what is refused is not what the state was saved of
                resume.end()
            raise
        partial.move(out)


def tell(out: Path, line: str, found: dict[str, Any], quiet: bool, json: bool) -> None:
    """Print the sizes; on standard error if the data went to standard output."""
    if json:
        print_json({"file": str(out), **found})
    elif not is_stdin(out):
        print(f"{out}: {line}")
    elif not quiet:
        print(line, file=sys.stderr)


def named(file: Path) -> str:
    """The display name of an input `Stream`."""
    return "standard input" if is_stdin(file) else str(file)


def new(path: Path, json: bool = False) -> Path:
    """A file that does not exist yet, or standard output without `json`. Raises UsageError and ResourceError."""
    from bytelm.data.files import aside_of

    if is_stdin(path):
        if json:
            raise UsageError("--json and the data cannot both go to standard output: name a file with --out")
        return path
    try:
        if path.exists():  # as do those without a name: "", ".", "/"
            raise UsageError(f"{path} already exists: name another file with --out")
        with suppress(FileNotFoundError):
            aside_of(path.with_name(path.name + STATE)).lstat()  # an error where that name is too long
        folder = path.parent.is_dir()
    except OSError as error:
        raise ResourceError(f"cannot write {path} ({error.strerror}): {ELSEWHERE}") from error
    if not folder:  # not after all the work
        raise ResourceError(f"cannot write {path} (no folder {path.parent}): {ELSEWHERE}")
    return path


def given(path: Path) -> tuple[Source, int]:
    """The bytes of an input `Stream`, and their number, at least one. Raises DataError."""
    import numpy as np

    from bytelm.compress.windows import Held, Plain

    if is_stdin(path):
        data = read(path)
        return Held(np.frombuffer(data, np.uint8)), len(data)
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path} is a folder: compress the files in it, or one archive of them")
    if stat.S_ISFIFO(found.st_mode):
        raise DataError(f"{path} is a pipe, and a file is read twice: give - for standard input, with < {path}")
    source, size = Plain(path, found.st_size), found.st_size
    if not size:
        raise DataError(f"{path} is empty: there is nothing to do")
    return source, size


def read(path: Path) -> bytes:
    """The bytes of a file, at least one. Raises DataError."""
    try:
        data = sys.stdin.buffer.read() if is_stdin(path) else path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {named(path)}: {error.strerror}") from None
    if not data:
        raise DataError(f"{named(path)} is empty: there is nothing to do")
    return data


def write(path: Path, data: bytes) -> None:
    """Write a file atomically, or standard output. Raises ResourceError."""
    from bytelm.data.files import write_whole

    if is_stdin(path):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    write_whole(path, data)
