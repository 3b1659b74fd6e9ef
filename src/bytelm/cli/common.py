"""Shared by the commands: parsing of texts on the command line, printing of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bytelm.errors import DataError, UsageError
from bytelm.units import show_bytes

Sets = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="One setting, as in train.learning_rate=1e-3. May be repeated."),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Device = Annotated[str, Parameter(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")]
Weights = Annotated[
    Literal["bf16", "int8"] | None,
    Parameter(
        name=("--weights", "--quantize"),
        help="Pack linear layers in bf16 or int8: a fraction of the memory, and faster; eval measures the loss.",
    ),
]
Tables = Annotated[
    Literal["mapped", "memory"] | None,
    Parameter(help="Where n-gram tables are: mapped (rows are read from the file) or in memory, as they are stored."),
]
Quiet = Annotated[bool, Parameter(negative="", help="Print only results and errors.")]
Strict = Annotated[bool, Parameter(negative="", help="Treat a file that would be skipped as an error.")]


STDIN = "@-"  # what a lone hyphen is replaced by for the commands


def refuse_stdin(kind: Any, value: Any) -> None:
    """Refuse a lone hyphen as the path of an argument; one for a stream is a `Stream`. Raises ValueError."""
    if isinstance(value, Path) and str(value) == STDIN:
        raise ValueError("It cannot be standard input or output: name a path (./- for one called -).")


Stream = Annotated[Path, Parameter(validator=())]
"""A file, or - for standard input or output."""


def is_stdin(path: Path | None) -> bool:
    """Whether a `Stream` is a lone hyphen."""
    return str(path) == STDIN


def lone(argument: str) -> str:
    """An argument as it was typed."""
    return "-" if argument == STDIN else argument


def paths_of(arguments: Sequence[str]) -> list[str]:
    """Paths as `data.sources` takes them."""
    return [lone(argument) for argument in arguments]


def text_of(argument: str, hex: bool = False) -> bytes:
    """The bytes an argument stands for: text, hex digits, `@file`, or `-` for standard input."""
    if argument == STDIN:
        return sys.stdin.buffer.read()
    if argument.startswith("@"):
        try:
            return Path(argument[1:]).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {argument[1:]} ({error.strerror}): name a file after the @") from None
    if hex:
        try:
            return bytes.fromhex(argument)
        except ValueError:
            raise UsageError(f"--hex {argument!r}: give two hex digits for each byte, as in 'ff 00'") from None
    return argument.encode(errors="surrogateescape")


def counter(what: str, total: int, quiet: bool) -> Callable[[int], None] | None:
    """A progress callback that counts parts of `total` bytes on a terminal; None if quiet or without a terminal."""
    if quiet or not sys.stderr.isatty():
        return None
    seen = 0

    def count(more: int) -> None:
        nonlocal seen
        seen += more
        end = "\n" if seen >= total else ""
        print(f"\r{what}: {show_bytes(seen)} of {show_bytes(total)}  ", end=end, file=sys.stderr, flush=True)

    return count


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=1))


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A human-readable table: names on the left, figures on the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    class Steady(Console):
        def on_broken_pipe(self) -> None:
            """Handled by `cli.run`: rich would exit with 1."""
            raise BrokenPipeError

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    # Without a terminal nothing is wrapped, so that each row of a table in a file is one line.
    Steady(width=None if Console().is_terminal else 200).print(table)


def row_of(name: str, figures: Any) -> tuple[str, float, str]:
    """A row of `print_verdict`: bits per byte, and their interval."""
    return name, figures.bits_per_byte, "" if figures.low is None else f"{figures.low:.3f} to {figures.high:.3f}"


def memory_of(online: Any) -> str:
    """What the predictors of an online memory are for, and how it began."""
    began = f"{online.read_before:,} bytes read before" if online.read_before else "begun empty"
    return f"online memory for {online.kind}, {began}"


def print_verdict(verdict: Any) -> None:
    """Bits per byte beside the compressors, best first; by plane and by file if there are several."""
    rows = [row_of("this model", verdict)]
    if online := verdict.online:
        rows.append(row_of(f"with {memory_of(online)}", online))
    if dynamic := verdict.dynamic:
        rows.append(row_of(f"with dynamic evaluation ({dynamic.learning})", dynamic))
        if online := dynamic.online:
            rows.append(row_of(f"with dynamic evaluation ({dynamic.learning}) and {memory_of(online)}", online))
    rows += [(name, bits, "") for name, bits in verdict.compressors.items()]
    rows.sort(key=lambda row: row[1])
    print(
        f"{verdict.bytes:,} bytes in {verdict.documents} documents, each scored once; "
        f"context {verdict.context}, stride {verdict.stride}"
    )
    print_table(["", verdict.unit, "95 % interval"], [(name, f"{bits:.3f}", b) for name, bits, b in rows])
    if dynamic:
        print(
            f"dynamic evaluation: a step of {dynamic.rate:g} after each window; {show_bytes(dynamic.copied_bytes)} of "
            f"weights copied, {show_bytes(dynamic.state_bytes)} of optimizer state, "
            f"{show_bytes(dynamic.bytes_per_second)}/s"
        )
    if verdict.planes:
        print_table(["plane", verdict.unit], [(name, f"{bits:.3f}") for name, bits in verdict.planes.items()])
    if len(verdict.files) > 1:
        rows = [(f.name, f"{f.bytes:,}", f"{f.bits_per_byte:.3f}") for f in verdict.files]
        print_table(["", "bytes", verdict.unit], rows)
