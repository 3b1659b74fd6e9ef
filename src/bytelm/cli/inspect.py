"""The verbs that show: patches, presets, report."""

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
from bytelm.units import show_seconds

SHARE = 0.5  # of the machine's rate of products, which training reaches: 0.4 to 0.7 (docs/log.md)


def patches(
    source: str,
    text: str,
    /,
    *,
    html: Annotated[Path | None, Parameter(help="Write the picture into this file.")] = None,
    hex: Annotated[bool, Parameter(negative="", help="The text is given as hex digits.")] = False,
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Cut a text into patches and show it in colours, with the entropy under it.

    Example: bytelm patches runs/demo "Byte models do not tokenise." --html patches.html
    Example: bytelm patches space "The quick fox"

    Parameters
    ----------
    source
        A run, or a scheme that needs no scorer: fixed, space, or fixed:SIZE.
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
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # whose meaning is that there are colours
        from rich.console import Console

        Console().print(terminal(view, shutil.get_terminal_size().columns))
        print(summary(view))
    else:
        print(plain(view))
    return 0


def presets(*, device: Device = "auto", json: Json = False) -> int:
    """The presets: what each is made of, its true parameter counts, and what training takes here.

    Example: bytelm presets
    """
    from bytelm.config import preset_names
    from bytelm.device import use
    from bytelm.train.estimate import TRAINING, multiplied
    from bytelm.train.settings import describe

    rate = multiplied(use(device))
    rows = [describe(name) for name in preset_names()]
    for row in rows:
        row["seconds_per_megabyte"] = 1e6 * TRAINING * row["flops_per_byte"] / (SHARE * rate)
        row["time/MB"] = show_seconds(row["seconds_per_megabyte"])
    if json:
        print_json(rows)
        return 0
    head = ["preset", "model", "patching", "nominal", "parameters", "n-gram tables", "scorer", "window"]
    head += ["FLOPs/byte", "memory", "time/MB"]
    print_table(head, [[str(row[key]) for key in head] for row in rows])
    print("nominal: the paper's name for the size; parameters: what there is, of the model itself")
    print("FLOPs/byte: of the model's matrix products, forward, over a window; times 3 in training")
    print("memory: a step of training at its peak, in bfloat16 with weights in float32; less with train.recompute")
    print(f"time/MB: of training on a megabyte, at half of the {rate / 1e9:.0f} GFLOP/s of large products here")
    print("train with one: bytelm train PATH --preset NAME; --dry-run measures it")
    return 0


def report(run: Path, /, *, out: Stream | None = None, device: Device = "auto", quiet: Quiet = False) -> int:
    """Write the report of a run, finished or not, as one self-contained HTML page.

    It is drawn from the files of the run. Where those on the newest checkpoint are missing, as in a run that was
    interrupted, the model is loaded once to make them: its patches and samples.

    Example: bytelm report runs/demo

    Parameters
    ----------
    out
        Where, or - for standard output; default: RUN/report.html.
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
