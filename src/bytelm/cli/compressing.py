"""The verbs that make files small and large again: compress, decompress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bytelm.cli.common import Json, Quiet, counter, print_json
from bytelm.errors import DataError, ResourceError, UsageError

Out = Annotated[Path | None, Parameter(name=("--out", "-o"))]
SUFFIX = ".blm"


def compress(run: Path, file: Path, /, *, out: Out = None, quiet: Quiet = False, json: Json = False) -> int:
    """Compress a file with a model: about as many bits as `bytelm eval` says, byte for byte restored by decompress.

    Example: bytelm compress runs/demo notes.txt

    Parameters
    ----------
    run
        A run, or one checkpoint of it; the very same is needed to decompress.
    out
        The file to write; FILE.blm unless given.
    """
    from bytelm.compress.stream import compress as pack
    from bytelm.evaluate.compressors import compressed
    from bytelm.lm import load

    out = new(out or file.with_name(file.name + SUFFIX))
    data, lm = read(file), load(run)
    packed = pack(lm.model, data, lm.context, counter("compressing", len(data), quiet or json))
    write(out, packed)
    sizes = {name: round(bits * len(data) / 8) for name, bits in compressed([data]).items()}
    bits = 8 * len(packed) / len(data)
    if json:
        print_json({"file": str(out), "from": len(data), "bytes": len(packed), "bits_per_byte": bits, **sizes})
    else:
        others = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        print(f"{out}: {len(data):,} → {len(packed):,} bytes, {bits:.3f} bits/byte; {others}")
    return 0


def decompress(run: Path, file: Path, /, *, out: Out = None, quiet: Quiet = False, json: Json = False) -> int:
    """Restore a file that was compressed with the same model, on the same machine.

    Example: bytelm decompress runs/demo notes.txt.blm --out notes.txt

    Parameters
    ----------
    run
        The run that compressed it.
    out
        The file to write; FILE without .blm unless given.
    """
    from bytelm.compress.stream import decompress as unpack
    from bytelm.compress.stream import opened
    from bytelm.lm import load

    if out is None and file.suffix != SUFFIX:
        raise UsageError(f"{file} does not end in {SUFFIX}: name the file to write with --out")
    out = new(out or file.with_suffix(""))
    packed, lm = read(file), load(run)
    try:
        size, _, _ = opened(lm.model, packed)
        data = unpack(lm.model, packed, counter("decompressing", size, quiet or json))
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    write(out, data)
    if json:
        print_json({"file": str(out), "from": len(packed), "bytes": len(data)})
    else:
        print(f"{out}: {len(packed):,} → {len(data):,} bytes")
    return 0


def new(path: Path) -> Path:
    """A file that is not there yet. Raises UsageError."""
    if path.exists():
        raise UsageError(f"{path} is there already: name another file with --out")
    return path


def read(path: Path) -> bytes:
    """The bytes of a file, at least one. Raises DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not data:
        raise DataError(f"{path} is empty: there is nothing to do")
    return data


def write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises ResourceError."""
    from bytelm.data.files import write_whole

    try:
        write_whole(path, data)
    except OSError as error:
        raise ResourceError(f"cannot write {path} ({error.strerror}): choose another place with --out") from error
