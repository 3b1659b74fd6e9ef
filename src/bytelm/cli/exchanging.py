"""The verbs that bring weights of other projects in and take ours out: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bytelm.cli.common import Sets, print_table
from bytelm.config import assignments
from bytelm.errors import UsageError


def convert(
    source: Path,
    run: Path,
    /,
    *,
    layout: Annotated[str, Parameter(name="--from")],
    set: Sets = None,
    check: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Make a run of weights from elsewhere: the same numbers, with our generation and measurement.

    Example: bytelm convert blt-1b-hf runs/blt-1b --from hf
    Example: bytelm convert blt-1b runs/blt-1b --from meta --set patching.threshold=1.34
    Example: bytelm convert model.pt runs/megabyte --from megabyte --set heads=8 --set max_seq_len=[1024,4]

    Parameters
    ----------
    source
        The folder with the weights and their config.json; of MEGABYTE-pytorch and MBLM the file.
    run
        The run to make.
    layout
        hf: BLT of Hugging Face's transformers. meta: BLT of Meta's code, from the hub or as downloaded.
        megabyte: MEGABYTE-pytorch or MBLM; --set gives what a constructor was given and tensors do not tell.
    check
        Compare the logits of source and run; the source's library (transformers, MEGABYTE-pytorch) must be installed.
    dry_run
        Write nothing: print which tensor would become which of ours.
    """
    if check and dry_run:
        raise UsageError("--check compares a run, and --dry-run makes none: leave one of them out")
    from bytelm.exchange import convert as making
    from bytelm.units import show_bytes, show_count

    told = assignments(set or [], "--set")
    made = making.convert(source, layout, run, told, dry_run=dry_run)
    if dry_run:
        print_table(["tensor", "dtype and shape", "becomes"], [(*row[:2], row[2] or "left out") for row in made.table])
        print(f"{show_count(made.parameters)} parameters, context {show_bytes(made.context)}")
        return 0
    print(f"{show_count(made.parameters)} parameters, context {show_bytes(made.context)}: {run}")
    if check:
        from bytelm.exchange.check import check as compare

        found = compare(source, layout, run)
        print(f"logits:  the source's to {found.apart:.1e} (up to {found.largest:.3g}), at {found.bytes} bytes")
    print(f'next:    bytelm generate {run} "..." | bytelm eval {run} FILE | bytelm patches {run} "..."')
    return 0


def export(run: Path, folder: Path, /, *, layout: Annotated[str, Parameter(name="--to")], set: Sets = None) -> int:
    """Write a run's BLT in the layout of another project, with its entropy model.

    Example: bytelm export runs/notes notes-hf --to hf --set patching.max_length=none --set patching.max_singles=none

    Parameters
    ----------
    run
        A run, or one checkpoint of it.
    folder
        The folder to write; it must be new.
    layout
        hf: for Hugging Face's transformers. meta: for Meta's code.
    """
    from bytelm.exchange.convert import export as write
    from bytelm.exchange.format import MODALITY
    from bytelm.units import show_count

    written = write(run, layout, folder, assignments(set or [], "--set"))
    print(f"{show_count(written.parameters)} parameters: {folder}")
    if written.modality:
        print(f"note:    its bytes stand for {written.modality}: kept as {MODALITY} in config.json, for bytelm alone")
    if (folder / "README.md").exists():
        print(
            f"note:    read {folder / 'README.md'} first: generate from one text at a time, padding is not masked there"
        )
    return 0
