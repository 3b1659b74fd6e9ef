"""The commands that inspect: patches, presets, report."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bytelm.cli.common import Device, Json, Quiet, Stream, counter, is_stdin, print_json, print_table, text_of
from bytelm.errors import UsageError

SHARE = 0.5  # fraction of peak matmul throughput (MFU) that training reaches: 0.4 to 0.7 (docs/log.md)


def patches(
    source: str,
    text: str,
    /,
    *,
    html: Annotated[Path | None, Parameter(help="Write the figure to this HTML file.")] = None,
    hex: Annotated[bool, Parameter(negative="", help="The text is given as hex digits.")] = False,
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Show the patches of a text in colours, with the next-byte entropy.

    Example: bytelm patches runs/demo "Byte models do not tokenise." --html patches.html
    Example: bytelm patches space "The quick fox"

    Parameters
    ----------
    source
        A run, or a scheme without an entropy model: fixed, space, or fixed:SIZE.
    text
        Text, @file, or - for standard input.
    """
    from bytelm.device import use
    from bytelm.inspection import view_of
    from bytelm.report.page import write
    from bytelm.report.patches import html as page
    from bytelm.report.patches import plain, summary, terminal

    view = view_of(source, text_of(text, hex), use(device))
    if html is not None:
        write(html, page(view, f"Patches of {source}"))
    if json:
        cuts = [i for i, opens in enumerate(view.opens) if opens]
        found: dict[str, Any] = {"bytes": len(view.data), "patches": len(cuts), "opens": cuts}
        print_json({**found, "entropies": view.entropies, "threshold": view.threshold})
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # colours are the point of it
        from rich.console import Console

        Console().print(terminal(view, shutil.get_terminal_size().columns))
        print(summary(view))
    else:
        print(plain(view))
    return 0


def presets(*, device: Device = "auto", json: Json = False) -> int:
    """List the presets: architecture, parameters, memory and training time on this machine.

    Example: bytelm presets
    """
    from bytelm.config import preset_names
    from bytelm.device import use
    from bytelm.training.estimate import TRAINING, multiplied
    from bytelm.training.settings import describe, table

    rate = multiplied(use(device))
    rows = [describe(name) for name in preset_names()]
    for row in rows:
        row["seconds_per_megabyte"] = 1e6 * TRAINING * row["flops_per_byte"] / (SHARE * rate)
    if json:
        print_json(rows)
        return 0
    print_table(*table(rows))
    print("nominal: the paper's name for the size; parameters: the actual number, of the model itself")
    print("FLOPs/byte: of the model's matrix products, forward, over a window; times 3 in training")
    print(
        "memory: peak of a training step, in bfloat16 with weights in float32; less with train.activation_checkpointing"
    )
    print(f"time/MB: training time per MB, at half of the {rate / 1e9:.0f} GFLOP/s that large matmuls reach here")
    print("to train one: bytelm train PATH --preset NAME; --dry-run measures its speed")
    return 0


def report(run: Path, /, *, out: Stream | None = None, device: Device = "auto", quiet: Quiet = False) -> int:
    """Write the report of a run, finished or not, as one self-contained HTML page.

    It is drawn from the files of the run.

    Where patches and samples of the newest checkpoint are missing, as in a run that was interrupted, it makes them.

    Example: bytelm report runs/demo

    Parameters
    ----------
    out
        The file to write, or - for standard output (default: RUN/report.html).
    """
    from bytelm.checkpoint.assemble import load
    from bytelm.device import use
    from bytelm.inspection import inspected
    from bytelm.report.gather import gather
    from bytelm.report.page import render, write

    if not run.is_dir():
        raise UsageError(f"no run at {run}: name a directory that `bytelm train` wrote")
    found = inspected(run, lambda: load(run, use(device)), partial(counter, quiet=quiet))
    path, page = out or run / "report.html", render(gather(run, found))
    if is_stdin(out):
        sys.stdout.write(page)
        return 0
    write(path, page)
    print(path)
    return 0
