"""The verbs that learn: train, calibrate, demo."""

from __future__ import annotations

import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bytelm.cli.common import Json, Quiet, Sets, Strict, counter, paths_of, print_json, print_table, print_verdict
from bytelm.errors import DataError, UsageError

HELD_OUT = 1 << 18  # bytes that the closing measurement of a training takes at the most
EXAMPLE = "def parse_header(line):\n"


def train(
    *paths: str,
    modality: Annotated[str | None, Parameter(name="--as")] = None,
    preset: Annotated[str | None, Parameter(help="A preset's name: see `bytelm presets`.")] = None,
    config: Annotated[Path | None, Parameter(help="A TOML file over the preset.")] = None,
    set: Sets = None,
    start: Annotated[Path | None, Parameter(name="--from")] = None,
    run: Annotated[Path | None, Parameter(help="Where everything is kept; runs/NAME unless given.")] = None,
    steps: int | None = None,
    minutes: float | None = None,
    bytes: int | None = None,
    log: str | None = None,
    strict: Strict = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Train on files of any kind; the same command after an interruption goes on.

    Example: bytelm train ~/notes "src/**/*.py" --minutes 10

    Parameters
    ----------
    paths
        Folders, files, patterns, - for standard input, hf:OWNER/NAME for a dataset, or a folder of `bytelm data pack`;
        .gz, .xz, .zst, .jsonl and .parquet are opened.
    modality
        What the files are: image:64 (pixels; also image:96x64:grey:patch8), audio:16k (samples a second; also
        audio:8k:8bit), dna. Bytes as they are unless given.
    start
        A run to start from: its model, its weights and how it learnt, at a tenth of the learning rate.
    steps
        Stop after so many steps.
    minutes
        Stop after so many minutes of training.
    bytes
        Stop after so many bytes.
    log
        Who else is told: tensorboard, trackio, wandb, with commas between.
    """
    if not paths:
        raise UsageError("nothing to train on: name files or folders, as in `bytelm train ~/notes`")
    from bytelm.data.packed import pack_of
    from bytelm.train.loggers import names_in
    from bytelm.train.run import train as fit
    from bytelm.train.settings import configure

    sources = paths_of(paths)
    run = run or Path("runs") / name_of(sources[0])
    sets = [*(set or []), *(["data.strict=true"] if strict else [])]
    limits = partial(configure, steps=steps, minutes=minutes, bytes=bytes)
    settings = limits(preset, config, sets, modality=modality, packed=pack_of(sources, run), start=start, run=run)
    result = fit(sources, settings, run, quiet=quiet, log=names_in(log))
    if result.signal is not None:
        step = f"saved step {result.progress.step}" if result.progress else "saved what was prepared"
        print(f"{step} in {run}; the same command goes on from there", file=sys.stderr)
        return 128 + result.signal
    close(run, quiet, json)
    return 0


def name_of(path: str) -> str:
    """A name for a run, from the first path it learns from."""
    if path == "-":
        return "stdin"
    stem = Path(path.split("*")[0].rstrip("/") or "run").resolve().name.split(".")[0]
    return stem or "run"


def close(run: Path, quiet: bool, json: bool) -> None:
    """Measure a finished run on its held-out bytes, write its report, and say what to do next."""
    from bytelm.checkpoint.assemble import load
    from bytelm.data.corpus import Corpus, Split
    from bytelm.data.selection import spread
    from bytelm.evaluate.verdict import judge
    from bytelm.report.gather import gather, keep_verdict
    from bytelm.report.page import render, write

    loaded = load(run)
    corpus = Corpus.open(run / "data")
    splits: tuple[Split, ...] = ("test", "valid")
    split: Split | None = next((s for s in splits if corpus.bytes(s)), None)
    verdict = None
    if split is not None:
        documents = spread(corpus, split, HELD_OUT)
        progress = counter("measuring", sum(len(data) for _, data in documents), quiet)
        context = loaded.state["context"]
        verdict = judge(loaded.model, documents, context, progress=progress, modality=loaded.modality)
        keep_verdict(run, verdict)
    write(run / "report.html", render(gather(run, partial(counter, quiet=quiet))))
    if json:
        step = {key: loaded.state[key] for key in ("step", "bytes", "seconds", "skipped")}
        print_json({"run": str(run), **step, "held_out": verdict.mapping() if verdict else None})
    elif not quiet:
        if verdict is not None:
            print(f"\nheld out ({split}): ", end="")
            print_verdict(verdict)
        print(f"report:  {run / 'report.html'}")
        modality = loaded.modality
        if modality is not None and not modality.text:
            print(f"next:    bytelm generate {run} --out new{modality.suffix} | bytelm eval {run} FILE")
        else:
            print(f'next:    bytelm generate {run} "..." | bytelm eval {run} FILE | bytelm patches {run} "..."')


def calibrate(run: Path, size: float, /, *, rule: str | None = None, json: Json = False) -> int:
    """Find the thresholds at which a run's scorer cuts patches of a wanted mean size, and what that gives by file type.

    Example: bytelm calibrate runs/demo 6 --rule both

    Parameters
    ----------
    run
        A run that has a scorer; it is not changed.
    size
        The mean patch size wanted, in bytes.
    rule
        threshold, rise or both; the run's own unless given.
    """
    from bytelm.evaluate.recalibrate import recalibrate

    found = recalibrate(run, size, rule)
    if json:
        print_json(found.mapping())
        return 0
    cuts = {"threshold": found.threshold, "rise": found.rise}
    shown = ", ".join(f"{name} = {cut:.6g}" for name, cut in cuts.items() if cut is not None)
    print(f"{shown}  (nats; calibrated on training bytes)")
    rows = [(kind or "no suffix", f"{mean:.3f}") for kind, mean in found.by_kind.items()]
    print_table(["held-out bytes", "bytes a patch"], [*rows, ("all", f"{found.realised:.3f}")])
    return 0


def demo(
    *,
    run: Path = Path("runs/demo"),
    minutes: Annotated[float, Parameter(help="Minutes of training of the model itself.")] = 3.0,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """See it all at once: learn Python from this machine's own standard library, measure, write a function, report.

    Parameters
    ----------
    run
        Where everything is kept; the same command goes on with what is there.
    """
    import bytelm
    from bytelm.train.run import train as fit
    from bytelm.train.settings import configure

    result = fit(standard_library(), configure("demo", minutes=minutes), run, quiet=quiet)
    if result.signal is not None:
        print(f"saved in {run}; the same command goes on from there", file=sys.stderr)
        return 128 + result.signal
    close(run, quiet, json)
    if not quiet and not json:
        print(f"\n{EXAMPLE}", end="", flush=True)
        from bytelm.cli.measure import show_bytes_as_text

        show_bytes_as_text(bytelm.load(run).stream(EXAMPLE.encode(), max_bytes=300, temperature=0.5))
        print(f"\n\nopen {run / 'report.html'} to see the loss, the patches and more")
    return 0


def standard_library() -> list[str]:
    """This Python's own source files: the modules that lie in the library's top folder, some five megabytes of code."""
    root = Path(sysconfig.get_path("stdlib"))
    if not any(root.glob("*.py")):
        raise DataError(f"no Python sources in {root}: this Python came without them; try `bytelm train PATH`")
    return [f"{root}/*.py"]
