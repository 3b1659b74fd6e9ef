"""The commands of lossless compression: compress, decompress."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bytelm.cli.common import Json, Quiet, Stream, Tables, Weights, counter, is_stdin, print_json
from bytelm.cli.online import Online, opened
from bytelm.errors import DataError, ResourceError, UsageError

Out = Annotated[Stream | None, Parameter(name=("--out", "-o"), validator=())]
SUFFIX = ".blm"


def compress(
    run: Path,
    file: Stream,
    /,
    *,
    out: Out = None,
    online: Online = None,
    weights: Weights = None,
    tables: Tables = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Compress a file with a model, losslessly, to about the bits per byte of `bytelm eval`.

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
    from bytelm.compress.stream import compress as pack
    from bytelm.evaluate.compressors import compressed
    from bytelm.lm import load

    out = new(out or (file if is_stdin(file) else file.with_name(file.name + SUFFIX)), json)
    if is_stdin(out) and sys.stdout.isatty():
        raise UsageError("compressed data is not written to a terminal: name a file with --out")
    data, lm = read(file), load(run, weights=weights, tables=tables, watch=partial(counter, quiet=quiet or json))
    memory = opened(run, online)
    packed = pack(lm.model, data, lm.context, counter("compressing", len(data), quiet or json), memory)
    write(out, packed)
    sizes = {name: round(bits * len(data) / 8) for name, bits in compressed([data]).items()}
    bits = 8 * len(packed) / len(data)
    others = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    line = f"{len(data):,} → {len(packed):,} bytes, {bits:.3f} bits/byte; {others}"
    tell(out, line, {"from": len(data), "bytes": len(packed), "bits_per_byte": bits, **sizes}, quiet, json)
    return 0


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
    """Restore a file that was compressed with the same model, in the same precision, on the same machine.

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
    from bytelm.compress.stream import decompress as unpack
    from bytelm.compress.stream import opened as header_of
    from bytelm.lm import load

    if out is None and file.suffix != SUFFIX and not is_stdin(file):
        raise UsageError(f"{file} does not end in {SUFFIX}: name the file to write with --out")
    out = new(out or (file if is_stdin(file) else file.with_suffix("")), json)
    packed, lm = read(file), load(run, weights=weights, tables=tables, watch=partial(counter, quiet=quiet or json))
    try:
        header = header_of(lm.model, packed)
        memory = opened(run, header.online, header.memory)
        data = unpack(lm.model, packed, counter("decompressing", header.size, quiet or json), memory)
    except DataError as error:
        raise DataError(f"{named(file)}: {error}") from None
    write(out, data)
    tell(out, f"{len(packed):,} → {len(data):,} bytes", {"from": len(packed), "bytes": len(data)}, quiet, json)
    return 0


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


def new(path: Path, json: bool) -> Path:
    """A file that does not exist yet, or standard output without `json`. Raises UsageError."""
    if is_stdin(path):
        if json:
            raise UsageError("--json and the data cannot both go to standard output: name a file with --out")
        return path
    if path.exists():
        raise UsageError(f"{path} already exists: name another file with --out")
    return path


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
    try:
        write_whole(path, data)
    except OSError as error:
        raise ResourceError(f"cannot write {path} ({error.strerror}): choose another place with --out") from error
