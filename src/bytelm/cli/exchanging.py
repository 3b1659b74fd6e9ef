"""The verbs that bring weights of other projects in and take ours out: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bytelm.cli.common import Sets
from bytelm.config import assignments

Theirs = Literal["hf", "meta"]
Known = Literal["hf", "meta", "megabyte"]


def convert(source: Path, run: Path, /, *, layout: Annotated[Known, Parameter(name="--from")], set: Sets = None) -> int:
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
    """
    from bytelm.exchange import convert as making
    from bytelm.units import show_bytes, show_count

    told = assignments(set or [], "--set")
    if layout == "megabyte":
        made = making.convert_megabyte(source, run, told)
    else:
        made = making.convert(source, layout, run, told)
    print(f"{show_count(made.parameters)} parameters, context {show_bytes(made.context)}: {run}")
    patches = "" if layout == "megabyte" else f' | bytelm patches {run} "..."'
    print(f'next:    bytelm generate {run} "..." | bytelm eval {run} FILE{patches}')
    return 0


def export(run: Path, folder: Path, /, *, layout: Annotated[Theirs, Parameter(name="--to")], set: Sets = None) -> int:
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
    from bytelm.units import show_count

    parameters = write(run, layout, folder, assignments(set or [], "--set"))
    print(f"{show_count(parameters)} parameters: {folder}")
    if layout == "hf":
        print(f"note:    generate from one text at a time: padding is not masked there, see {folder / 'README.md'}")
    return 0
