"""Benchmarks on a GPU, in stages; every result is written at once.

    python benchmarks/gpu.py env steps --seconds 300     some stages (default: all), with a time limit
    python benchmarks/gpu.py steps --only "BLT 100M"     some measurements of a stage
    python benchmarks/gpu.py --piece 1                   the stages of one of three calls, each below ten minutes
    python benchmarks/gpu.py --pretend                   a rehearsal: every stage on the CPU in tiny shapes

On a machine that lacks what `gpu_bundle.py` gathers: PYTHONPATH=build/gpu/libs:src. Each stage (see `stages/`) is a
process, each measurement a line of OUT/STAGE.jsonl; existing ones are kept. One that takes too long is aborted, with
its stack. After a failed kernel all CUDA calls of that process fail: it ends, the measurement is repeated once with
CUDA_LAUNCH_BLOCKING=1, so that the error has the right place, and the next process continues. OUT/table.txt has the
final table.

piece 1   env, ceilings, waits, laws, kernels, tables, steps, greedy, write
piece 2   compare
piece 3   peers, check

"floors" needs no GPU: roofline step times at the rates in OUT/ceilings.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from stages.bench import DATA, Bench, Found, free, read, write

PIECES = {
    1: ("env", "ceilings", "waits", "laws", "kernels", "tables", "steps", "greedy", "write"),
    2: ("compare",),
    3: ("peers", "check"),
}
STAGES = (*(stage for piece in PIECES.values() for stage in piece), "floors")
BROKEN = 7  # exit code of a process in which CUDA does not work any longer
MUTABLE_SETTINGS = ("env", "floors")  # stages that run without a GPU
SHOWN = 300  # letters of a measurement that are printed when it is there

# --- in the process of a stage ----------------------------------------------------------------------------------------


def measure(call: Callable[[], Found]) -> Found:
    """The result of a measurement, or its failure."""
    try:
        return call()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        return {"failed": f"{type(error).__name__}: {first[:500]}", "frames": frames[-12:]}


def broken(bench: Bench) -> bool:
    """Whether this process cannot use its GPU any longer."""
    try:
        bench.wait()
    except RuntimeError:
        return True
    return False


def work(stage: str, bench: Bench, only: Sequence[str], again: str | None) -> int:
    """Run the missing measurements, or one again with blocking launches."""
    module = importlib.import_module(f"stages.{stage}")
    done = bench.found(stage)
    for name, call in module.measurements(bench):
        if name != again if again else name in done or (only and name not in only):
            continue
        name = f"{name}, blocking" if again else name
        write(bench.out, stage, {"name": name, "begun": time.time()})
        faulthandler.dump_traceback_later(module.EACH, exit=True)
        began = time.perf_counter()
        found = measure(call)
        faulthandler.cancel_dump_traceback_later()
        write(bench.out, stage, {"name": name, "took": round(time.perf_counter() - began, 3), **found})
        if broken(bench):
            return BROKEN
        free()
    return 0


# --- in the process that starts them ----------------------------------------------------------------------------------


def begun(out: Path, stage: str) -> str | None:
    """The measurement during which a process died."""
    last = (list(read(out, stage)) or [{}])[-1]
    return last["name"] if "begun" in last else None


def process(stage: str, options: argparse.Namespace, left: float, again: str | None = None) -> int | None:
    """Run a stage's process and print its results. Returns its exit code; None after a timeout."""
    command = [sys.executable, str(Path(__file__)), stage, "--out", str(options.out), "--data", str(options.data)]
    command += ["--budget", str(options.budget), "--seconds", str(left), "--work", *["--pretend"] * options.pretend]
    command += [word for name in options.only for word in ("--only", name)] + (["--again", again] if again else [])
    log = options.out / f"{stage}.log"
    blocking = {"CUDA_LAUNCH_BLOCKING": "1"} if again else {}
    told = len(list(read(options.out, stage)))
    with log.open("a") as file:
        environment = {**os.environ, **blocking, **({"OMP_NUM_THREADS": "1"} if options.pretend else {})}
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        end, code = time.monotonic() + left, None
        try:
            while code is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(min(1.0, max(0.1, end - time.monotonic())))
                lines = list(read(options.out, stage))
                for line in lines[told:]:
                    tell(stage, line)
                told = len(lines)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
            child.wait()
    if code != 0 and (name := begun(options.out, stage)) is not None:
        reason = f"killed: {stage} had no time left" if code is None else f"the process ended with code {code}"
        line = {"name": name, "failed": reason, "frames": log.read_text(errors="replace").splitlines()[-30:]}
        write(options.out, stage, line)
        tell(stage, line)
    return code


def tell(stage: str, line: Found) -> None:
    if "begun" not in line:
        print(f"{stage} | {short(line)}", flush=True)


def short(line: Found) -> str:
    values = "; ".join(f"{key} {show(value)}" for key, value in line.items() if key != "name")
    return f"{line['name']} | {values}"[:SHOWN]


def run(stage: str, options: argparse.Namespace, end: float) -> None:
    """A stage, in as many processes as needed."""
    while (left := end - time.monotonic()) > 0:
        before = len(list(read(options.out, stage)))
        code = process(stage, options, left)
        if code in (0, None):
            return
        lines = list(read(options.out, stage))
        if len(lines) == before:  # it did not start
            line = {"name": "start", "failed": f"the process ended with code {code}: see {stage}.log"}
            write(options.out, stage, line)
            tell(stage, line)
            return
        if code == BROKEN or code < 0:
            process(stage, options, end - time.monotonic(), again=lines[-1]["name"])


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def table(out: Path, stages: Sequence[str]) -> Iterator[str]:
    """The results: one line per measurement, by stage."""
    for stage in stages:
        lines = [line for line in read(out, stage) if "begun" not in line]
        if not lines:
            yield f"\n{stage}: nothing was measured"
            continue
        columns = importlib.import_module(f"stages.{stage}").COLUMNS
        if not columns:
            yield f"\n{stage}"
            yield from map(short, lines)
            continue
        width = max(len(line["name"]) for line in lines) + 2
        yield f"\n{stage:<{width}}" + "".join(f"{column:>14}" for column in columns)
        for line in lines:
            cells = "".join(f"{show(line.get(column))[:13]:>14}" for column in columns)
            yield f"{line['name']:<{width}}" + (f"  FAILED {line['failed']}"[:200] if "failed" in line else cells)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--piece", type=int, choices=PIECES, help="the stages of one call")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a measurement of them")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all of them (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="corpora (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=1e16, help="FLOPs of each model of compare")
    parser.add_argument("--pretend", action="store_true", help="a rehearsal: on the CPU, small")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--again", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.stages = options.stages or (PIECES[options.piece] if options.piece else STAGES)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available() and not options.pretend
    if options.work:
        device = torch.device("cuda" if cuda else "cpu")
        bench = Bench(device, options.out, options.pretend, options.data, options.budget, options.seconds)
        return work(options.stages[0], bench, options.only, options.again)
    if not (cuda or options.pretend or set(options.stages) <= set(MUTABLE_SETTINGS)):
        print("gpu.py: no GPU: --pretend runs every stage on the CPU", file=sys.stderr)
        return 1
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stage is left running
    try:
        until = time.monotonic() + options.seconds
        for place, stage in enumerate(options.stages):
            began = time.monotonic()
            mine, *others = (importlib.import_module(f"stages.{other}").SECONDS for other in options.stages[place:])
            run(stage, options, began + (until - began) * mine / (mine + sum(others)))
            print(f"{stage}: {time.monotonic() - began:.0f} s", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = list(table(options.out, options.stages))
    (options.out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
