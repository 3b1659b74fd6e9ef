"""The commands that train: train, calibrate, demo."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bytelm.cli.common import (
    Device,
    Json,
    Quiet,
    Sets,
    Strict,
    counter,
    paths_of,
    print_json,
    print_table,
    print_verdict,
    refuse_stdin,
)
from bytelm.config import dump_toml, to_mapping
from bytelm.errors import DataError, UsageError
from bytelm.units import show_bytes

if TYPE_CHECKING:
    from bytelm.training.config import RunConfig
    from bytelm.training.finish import Result

EXAMPLE = "def parse_header(line):\n"
RISEN = 1.02  # times the lowest validation loss, from which on it is said at the end of a training


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Sources of the settings of a training."""

    modality: Annotated[str | None, Parameter(name="--as")] = None
    """Modality: image:64 (pixels; or image:96x64:grey:patch8), audio:16k (samples a second; or audio:8k:8bit), dna.
    Default: raw bytes."""
    preset: str | None = None
    """A preset's name: see `bytelm presets`."""
    config: Annotated[Path | None, Parameter(validator=refuse_stdin)] = None
    """A TOML file that overrides the preset."""
    set: Sets = None
    init_from: Annotated[Path | None, Parameter(validator=refuse_stdin)] = None
    """Fine-tune a run: its model, weights and training hyperparameters, at a tenth of the learning rate."""
    steps: int | None = None
    """Training budget in steps."""
    minutes: float | None = None
    """Training budget in minutes of training."""
    bytes: int | None = None
    """Training budget in bytes processed."""
    device: str | None = None
    """Device to train on: auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    mix: str | None = None
    """Weights of several sources, each given as NAME=PATH: books=0.5,code=0.5; books=0.5@2 for at most 2 epochs."""
    strict: Strict = False

    def configure(self, sources: Sequence[str], run: Path) -> RunConfig:
        """The configuration of a run on `sources`, environment variables included."""
        from bytelm.data.packed import pack_of
        from bytelm.training.settings import configure

        return configure(
            self.preset,
            self.config,
            [*(self.set or []), *(["data.strict=true"] if self.strict else []), *self.placed()],
            modality=self.modality,
            packed=pack_of(sources, run),
            mix=() if self.mix is None else self.mix.split(","),
            init_from=self.init_from,
            run=run,
            steps=self.steps,
            minutes=self.minutes,
            bytes=self.bytes,
            environment=os.environ,
        )

    def placed(self) -> list[str]:
        """The device as a setting, if one was given."""
        return [] if self.device is None else [f"train.device={self.device}"]


def train(
    *paths: str,
    asked: TrainOptions | None = None,
    run: Path | None = None,
    log: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    world: int | None = None,
    mfu: float | None = None,
    print_config: Annotated[bool, Parameter(negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
    allow_change: Annotated[list[str] | None, Parameter(negative="")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Train on files of any kind; run the same command again to resume after an interruption.

    Every setting is an environment variable too: BYTELM_TRAIN__BATCH=4 is --set train.batch=4.

    Example: bytelm train ~/notes "src/**/*.py" --minutes 10
    Example: bytelm train --preset blt-1b --dry-run --world 64 --device h100
    Example: bytelm train books=~/books code=~/src --mix books=0.3,code=0.7

    Parameters
    ----------
    paths
        Folders, files, glob patterns, - for standard input, hf:OWNER/NAME, or what `bytelm data pack` wrote.
        .gz, .bz2, .xz, .zst, .tar, .zip, .jsonl and .parquet are read.
    run
        Run directory (default: runs/NAME).
    log
        Experiment trackers to log to, comma-separated: tensorboard, trackio, wandb.
    dry_run
        Estimate memory, FLOPs, time and disk, then exit.
    world
        With --dry-run: plan the training on so many GPUs (--device a100, h100, h200 or b200), from shapes alone.
    mfu
        Assumed fraction of the GPUs' peak FLOP/s of such a plan (default: 0.4).
    print_config
        Print every setting, as TOML that --config reads, then exit.
    force
        Start even if the estimate exceeds memory or disk.
    allow_change
        A setting of [train], as in train.learning_rate, that may differ from the existing run. May be repeated.
    """
    if world is not None or mfu is not None:
        return say_the_plan(paths_of(paths), asked or TrainOptions(), world, mfu, dry_run, json)
    if not paths and not print_config:
        raise UsageError("nothing to train on: name files or folders, as in `bytelm train ~/notes`")
    sources = paths_of(paths)
    run = run or Path("runs") / name_of(sources[0] if sources else "run")
    settings = (asked or TrainOptions()).configure(sources, run)
    if print_config:
        return print_settings(settings)
    if dry_run:
        return say_what_it_takes(sources, settings, run, force, json)
    from bytelm.training.finish import train as fit
    from bytelm.training.loggers import names_in

    shown: dict[str, Any] = {"quiet": quiet, "log": names_in(log), "watch": partial(counter, quiet=quiet)}
    return ended(fit(sources, settings, run, force=force, allow_change=allow_change or (), **shown), quiet, json)


def print_settings(settings: RunConfig) -> int:
    """Print every setting, as TOML."""
    print(dump_toml(to_mapping(settings)), end="")
    return 0


def ended(result: Result, quiet: bool, json: bool) -> int:
    """Print how a training ended and return its exit code: 0, or that of `training.stop` if a signal stopped it."""
    from bytelm.training.dist import is_main_process
    from bytelm.training.stop import exit_code

    run, signal, final = result.run, result.signal, result.final
    if signal is not None:
        if is_main_process():
            saved = "prepared data" if result.progress is None else f"step {result.progress.step}"
            print(f"saved {saved} in {run}; run the same command again to resume", file=sys.stderr)
        return exit_code(signal)
    if final is None:
        return 0
    if json:
        print_json(result.mapping())
    elif not quiet:
        if final.evaluation is not None:
            print(f"\n{'validation' if final.split == 'valid' else final.split} split: ", end="")
            print_verdict(final.evaluation)
        if (line := risen(run)) is not None:
            print(line)
        print(f"report:  {final.report}")
        modality = final.modality
        if modality is not None and not modality.text:
            print(f"next:    bytelm generate {run} --out new{modality.suffix} | bytelm eval {run} FILE")
        else:
            print(f'next:    bytelm generate {run} "..." | bytelm eval {run} FILE | bytelm patches {run} "..."')
    return 0


def risen(run: Path) -> str | None:
    """What to say of a run that overfits: its validation loss was lower before its end."""
    from bytelm.checkpoint.metrics import METRICS, read_history

    found = [line for line in read_history(run / METRICS) if line["kind"] == "validation"]
    if not found:
        return None
    last, best = found[-1], min(found, key=lambda line: line["bits_per_byte"])
    if last["bits_per_byte"] < RISEN * best["bits_per_byte"]:
        return None
    lowest, processed = f"{best['bits_per_byte']:.3f} bits/byte", best["bytes"]
    return (
        f"caution: validation was at {lowest} after {show_bytes(processed)}, and rose to {last['bits_per_byte']:.3f}: "
        f"the model overfits; give more files, or --bytes {processed}"
    )


def say_what_it_takes(sources: Sequence[str], settings: RunConfig, run: Path, force: bool, json: bool) -> int:
    """Print the estimate of a training; raises as the training itself would."""
    from bytelm.training.estimate import check, estimate, lines, mapping, needs

    if not force:
        check(needs(sources, settings, run), settings, run)
    found = estimate(sources, settings, run)
    if json:
        print_json(mapping(found))
        return 0
    for what, value in lines(found, run):
        print(f"{what:<8}{value}")
    print("next:   the same command without --dry-run")
    return 0


def say_the_plan(
    sources: Sequence[str], asked: TrainOptions, world: int | None, mfu: float | None, dry_run: bool, json: bool
) -> int:
    """Print what a training on `world` GPUs would take, from shapes alone: nothing is read or measured."""
    from bytelm.training.limits import lines, mapping
    from bytelm.training.plan import GPUS, MFU, layout, plan

    if not dry_run or world is None:
        raise UsageError("--world and --mfu plan a training: take --dry-run --world N; torchrun starts processes")
    if asked.device is None:
        raise UsageError(f"--world {world} plans for a GPU: name one with --device {', '.join(GPUS)}")
    settings = replace(asked, device=None).configure(sources, Path("runs") / name_of("plan"))
    found = plan(settings, asked.device, layout(world, settings.parallel), MFU if mfu is None else mfu)
    if json:
        print_json(mapping(settings, found))
        return 0
    for what, value in lines(settings, found):
        print(f"{what:<14}{value}")
    return 0


def name_of(path: str) -> str:
    """A name for a run, from the first path of its data."""
    if path == "-":
        return "stdin"
    stem = Path(path.split("*")[0].rstrip("/") or "run").resolve().name.split(".")[0]
    return stem or "run"


def calibrate(
    run: Path, size: float, /, *, rule: str | None = None, device: Device = "auto", json: Json = False
) -> int:
    """Find the entropy thresholds for a target mean patch length, and print the resulting lengths by file type.

    Example: bytelm calibrate runs/demo 6 --rule both

    Parameters
    ----------
    run
        A run with an entropy model; it is not changed.
    size
        Target mean patch length, in bytes.
    rule
        threshold, relative or both (default: the run's rule).
    """
    from bytelm.device import use
    from bytelm.training.recalibrate import recalibrate
    from bytelm.training.stop import StopRequest

    with StopRequest():
        found = recalibrate(run, size, rule, use(device), quiet=json or not sys.stderr.isatty())
    if json:
        print_json(found.mapping())
        return 0
    cuts = {"threshold": found.threshold, "relative": found.relative_threshold}
    shown = ", ".join(f"{name} = {cut:.6g}" for name, cut in cuts.items() if cut is not None)
    print(f"{shown}  (nats; calibrated on training bytes)")
    rows = [(kind or "no suffix", f"{mean:.3f}") for kind, mean in found.by_kind.items()]
    print_table(["held-out files", "bytes per patch"], [*rows, ("all", f"{found.realised:.3f}")])
    return 0


def demo(
    *,
    run: Path = Path("runs/demo"),
    minutes: Annotated[float, Parameter(help="Training budget of the model itself, in minutes.")] = 3.0,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """A complete example: train on the Python standard library found here, evaluate, generate a function, report.

    Parameters
    ----------
    run
        Run directory; an existing run is resumed.
    """
    import bytelm
    from bytelm.device import use
    from bytelm.training.finish import train as fit
    from bytelm.training.settings import configure

    settings = configure("demo", sets=[f"train.device={device}"], minutes=minutes)
    result = fit(standard_library(), settings, run, quiet=quiet, watch=partial(counter, quiet=quiet))
    code = ended(result, quiet, json)
    if code or result.signal is not None:
        return code
    if not quiet and not json:
        print(f"\n{EXAMPLE}", end="", flush=True)
        from bytelm.cli.generating import show_bytes_as_text

        show_bytes_as_text(bytelm.load(run, use(device)).stream(EXAMPLE.encode(), max_bytes=300, temperature=0.5))
        print(f"\n\nopen {run / 'report.html'} to see training curves, patches and more")
    return 0


def standard_library() -> list[str]:
    """The source files of this Python's standard library, top folder only: about five megabytes of code."""
    root = Path(sysconfig.get_path("stdlib"))
    if not any(root.glob("*.py")):
        raise DataError(f"no Python sources in {root}: this Python has none; try `bytelm train PATH`")
    return [f"{root}/*.py"]
