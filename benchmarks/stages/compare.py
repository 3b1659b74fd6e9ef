"""One `bytelm compare` on novels: BLT and BPE at equal FLOPs, evaluated on the same held-out bytes.

The runs are in build/gpu/runs, so that the next call on the same machine resumes; results, page and journals are copied
to OUT.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from bytelm.compare.page import PAGE, PICTURE, RESULTS
from stages.bench import Bench, Found, Measurement

SECONDS, EACH = 560, 560
COLUMNS = ("seconds", "code", "blt", "bpe")
RUNS = Path("build/gpu/runs")
MODELS = "blt,bpe:4096"
CLOSING = 45.0  # seconds in which a comparison that is asked to stop saves, and is copied


def corpus(bench: Bench) -> tuple[Path, Path]:
    """What to learn from, and what to measure on."""
    if not bench.pretend:
        return bench.data / "books" / "train.txt.xz", bench.data / "books" / "test.txt.xz"
    files = bench.out / "train.txt", bench.out / "test.txt"
    for path, size in zip(files, (90_000, 8_000), strict=True):
        path.write_bytes(bytes(np.random.default_rng(size).integers(97, 101, size, dtype=np.uint8)))
    return files


def compared(bench: Bench) -> Found:
    learnt, held_out = corpus(bench)
    if not learnt.exists():
        return {"skipped": f"no {learnt}: gpu_bundle.py gathers it"}
    home = bench.size(RUNS, bench.out / "runs") / f"compare-{bench.budget:.0e}"
    budget, models = bench.size((bench.budget, MODELS), (1.2e11, "byte-window:32"))
    command = [sys.executable, "-m", "bytelm", "compare", str(learnt), "--held-out", str(held_out), "--run", str(home)]
    began = time.monotonic()
    child = subprocess.Popen([*command, "--models", models, "--budget", str(budget)])
    try:
        code = child.wait(max(10.0, bench.left - CLOSING))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        code = child.wait()
    for path in sorted(home.rglob("*.json*")) + [home / name for name in (PAGE, PICTURE)]:
        if path.exists() and path.stat().st_size < 1 << 23 and "checkpoints" not in path.parts:
            target = bench.out / "compare" / path.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    found: Found = {"seconds": time.monotonic() - began, "code": code, "budget": budget}
    results = home / RESULTS
    for model in json.loads(results.read_text())["models"] if results.exists() else ():
        found[model["model"].partition(":")[0]] = model["bits_per_byte"]
        found[f"{model['model']}, all"] = model
    return found if code == 0 else {"failed": f"bytelm compare ended with {code}: see compare.log", **found}


def measurements(bench: Bench) -> Iterator[Measurement]:
    yield f"{bench.budget:.0e}", partial(compared, bench)
