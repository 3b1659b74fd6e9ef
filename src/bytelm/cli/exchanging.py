"""The commands that import and export weights of other projects: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bytelm.cli.common import Sets, print_table
from bytelm.config import assignments
from bytelm.errors import UsageError

Kind = Literal["bf16", "int8"]

LARGE = 4  # a model in float32 that takes more than this part of the memory is better packed


def convert(
    source: Path,
    run: Path,
    /,
    *,
    layout: Annotated[str, Parameter(name="--format")],
    set: Sets = None,
    weights: Kind | None = None,
    tables: Kind | None = None,
    check: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Import weights of another project as a run, with equal logits, or store a run in another precision.

    Example: bytelm convert blt-1b-hf runs/blt-1b --format hf
    Example: bytelm convert blt-1b runs/blt-1b --format meta --set patching.threshold=1.34
    Example: bytelm convert model.pt runs/megabyte --format megabyte --set heads=8 --set max_seq_len=[1024,4]
    Example: bytelm convert hnet_2stage_XL.pt runs/hnet --format hnet
    Example: bytelm convert runs/notes runs/notes-int8 --format bytelm --tables int8

    Parameters
    ----------
    source
        The folder with the weights and their config.json; for H-Net, MEGABYTE-pytorch and MBLM also the file.
    run
        The run to create.
    layout
        hf: BLT of Hugging Face's transformers. meta: BLT of Meta's code, from the hub or as downloaded.
        megabyte: MEGABYTE-pytorch or MBLM; --set gives constructor arguments that cannot be inferred from tensors.
        hnet: H-Net's public code. bytelm: a run, one checkpoint of it, or a folder of save_pretrained.
    weights
        Store linear layers in this precision: bf16, or int8 with one scale per row. Default: as in the source.
    tables
        The same for n-gram tables.
    check
        Compare the logits of source and run; the source's library (transformers, MEGABYTE-pytorch) must be installed.
    dry_run
        Print the mapping of tensor names, then exit.
    """
    if check and dry_run:
        raise UsageError("--check needs a run, and --dry-run writes none: leave one of them out")
    if check and (weights or tables):
        raise UsageError("--check compares equal logits, which rounding changes: leave out --check, or the precision")
    from bytelm.exchange import convert as making
    from bytelm.units import show_bytes, show_count

    told = assignments(set or [], "--set")
    made = making.convert(source, layout, run, told, weights=weights, tables=tables, dry_run=dry_run)
    if dry_run:
        print_table(["tensor", "dtype and shape", "becomes"], [(*row[:2], row[2] or "ignored") for row in made.table])
        print(f"{show_count(made.parameters)} parameters, context {show_bytes(made.context)}")
        return 0
    print(f"{show_count(made.parameters)} parameters, context {show_bytes(made.context)}: {run}")
    if check:
        from bytelm.exchange.check import check as compare

        found = compare(source, layout, run)
        print(f"logits:  equal to {found.apart:.1e} (of up to {found.largest:.3g}), on {found.bytes} bytes")
    print(following(run, made.parameters))
    return 0


def following(run: Path, parameters: int) -> str:
    """What can be done with a run; with the options for little memory, if it is large."""
    from bytelm.machine import memory

    few = " --weights bf16 --tables mapped" if 4 * parameters > memory().total // LARGE else ""
    return f'next:    bytelm generate {run} "..."{few} | bytelm eval {run} FILE{few} | bytelm patches {run} "..."'


def export(run: Path, folder: Path, /, *, layout: Annotated[str, Parameter(name="--to")], set: Sets = None) -> int:
    """Write a run's BLT in the layout of another project, with its entropy model; or an H-Net that was imported.

    Example: bytelm export runs/notes notes-hf --to hf --set patching.max_length=none

    Parameters
    ----------
    run
        A run, or one checkpoint of it.
    folder
        The folder to write; it must be new.
    layout
        hf: for Hugging Face's transformers. meta: for Meta's code. hnet: for H-Net's.
    """
    from bytelm.exchange.convert import export as write
    from bytelm.exchange.format import MODALITY
    from bytelm.units import show_count

    written = write(run, layout, folder, assignments(set or [], "--set"))
    print(f"{show_count(written.parameters)} parameters: {folder}")
    if written.modality:
        print(f"note:    modality {written.modality}: kept as {MODALITY} in config.json, which only bytelm reads")
    if (folder / "README.md").exists():
        print(f"note:    generate with batch size 1: padding is not masked there, see {folder / 'README.md'}")
    return 0
