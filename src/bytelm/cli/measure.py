"""The verbs that use a trained model on bytes: eval, generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bytelm.cli.common import Json, counter, paths_of, print_json, print_verdict, text_of


def evaluate(
    run: Path,
    *paths: str,
    context: int | None = None,
    stride: int | None = None,
    json: Json = False,
) -> int:
    """Bits per byte of files, each byte scored once, beside gzip, bzip2 and xz on the same bytes.

    Example: bytelm eval runs/demo README.md src --json

    Parameters
    ----------
    run
        A run, or one checkpoint of it.
    paths
        What to measure, as for train; the run's own test documents unless given.
    context
        Bytes that a window holds; what the model was trained on unless given.
    stride
        Bytes that a window adds to the one before; half the context unless given.
    """
    from bytelm.checkpoint.assemble import load
    from bytelm.data.corpus import Corpus
    from bytelm.data.selection import spread
    from bytelm.data.sources import documents
    from bytelm.evaluate.verdict import judge

    loaded = load(run)
    if paths:
        found = [(document.name, b"".join(document.pieces)) for document in documents(paths_of(paths))]
    else:
        found = spread(Corpus.open(run / "data"), "test")
    progress = counter("measuring", sum(len(data) for _, data in found), json)
    verdict = judge(loaded.model, found, context or loaded.state["context"], stride, progress)
    if json:
        print_json(verdict.mapping())
    else:
        print_verdict(verdict)
    return 0


def generate(
    run: Path,
    prompt: str = "",
    /,
    *,
    hex: Annotated[bool, Parameter(negative="", help="The prompt is given as hex digits.")] = False,
    max_bytes: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Annotated[list[str] | None, Parameter(negative="", help="End before this text. May be repeated.")] = None,
    utf8: Annotated[bool, Parameter(negative="", help="Write nothing but valid UTF-8.")] = False,
    json: Json = False,
) -> int:
    """Let a model go on after a prompt, byte by byte as they are decided.

    Example: bytelm generate runs/demo "def main(" --temperature 0.5 --stop "\\n\\n"

    Parameters
    ----------
    run
        A run, or one checkpoint of it.
    prompt
        Text, @file, or - for standard input.
    max_bytes
        End after so many bytes.
    temperature
        0 always takes the likeliest byte.
    seed
        The same seed writes the same bytes.
    """
    from bytelm.lm import load

    start = text_of(prompt, hex)
    lm = load(run)
    began = time.perf_counter()
    pieces = lm.stream(
        start,
        max_bytes=max_bytes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=[text.encode().decode("unicode_escape").encode("latin-1") for text in stop or []],
        utf8=utf8,
    )
    collect = b"".join if json else show_bytes_as_text if sys.stdout.isatty() else copy_bytes
    written = collect(pieces)
    seconds = max(1e-9, time.perf_counter() - began)
    speed = len(written) / seconds
    if json:
        found = {"text": written.decode(errors="replace"), "hex": written.hex(), "bytes": len(written)}
        print_json({**found, "seconds": seconds, "bytes_per_second": speed})
    else:
        print(f"\n{len(written)} bytes, {speed:.0f} bytes/s", file=sys.stderr)
    return 0


def copy_bytes(pieces: Iterable[bytes]) -> bytes:
    """The very bytes to standard output, for a file or another program."""
    written = bytearray()
    for piece in pieces:
        written += piece
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    return bytes(written)


def show_bytes_as_text(pieces: Iterable[bytes]) -> bytes:
    """Text to the terminal: no character is broken, and of control characters only line ends and tabs get through."""
    from bytelm.generate.utf8 import decode

    written = bytearray()

    def kept() -> Iterator[bytes]:
        for piece in pieces:
            written.extend(piece)
            yield piece

    for text in decode(kept()):
        sys.stdout.write("".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text))
        sys.stdout.flush()
    return bytes(written)
