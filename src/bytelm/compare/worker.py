"""One model under one seed, in a process of its own: trained, measured, timed.

A process, so that its peak of memory is that of this model, and so that whatever ends it ends no other.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bytelm.checkpoint.assemble import load
from bytelm.checkpoint.metrics import METRICS, read_history
from bytelm.compare.held_out import kept
from bytelm.compare.plan import Planned
from bytelm.data.files import write_whole
from bytelm.data.sources import expanded
from bytelm.device import called, peak_memory, use
from bytelm.errors import BytelmError, UsageError
from bytelm.evaluate.bits import measure
from bytelm.evaluate.patches import patch_view
from bytelm.generate.session import generate
from bytelm.interfaces.model import ByteModel
from bytelm.training.run import train

PLAN, HELD_OUT, RESULT, FAILED = "plan.json", "held-out.bin", "result.json", "failed.txt"
LOOKS = 12  # at held-out bytes while a model learns, for the curves
PROMPT, WRITTEN, TIMES = 256, 256, 3  # bytes read and written to time generation, and how often


def patch_size(model: ByteModel, stretches: list[tuple[int, bytes]]) -> float | None:
    """Bytes of a patch or token in what was measured; None for a model that reads bytes one by one."""
    try:
        opens = [np.count_nonzero(patch_view(model, data).opens) for _, data in stretches]
    except UsageError:
        return None
    return sum(len(data) for _, data in stretches) / sum(opens)


def writing_speed(model: ByteModel, prompt: bytes) -> float:
    """Bytes a second of one document after a prompt, reading it included: the median of several."""
    seconds: list[float] = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        generate(model, [prompt], max_bytes=WRITTEN, eos=False)
        seconds.append(time.perf_counter() - began)
    return WRITTEN / float(np.median(seconds[1:]))  # the first one packs the weights


def work(home: Path, name: str, seed: int, run: Path, device: str, quiet: bool) -> int:
    """Train and measure one run of the comparison in `home`, and write its result; 128 and a signal if stopped."""
    plan = json.loads((home / PLAN).read_text(encoding="utf-8"))
    planned = Planned.of(plan["models"][name])
    stretches = kept(home / HELD_OUT)
    minutes = planned.config["train"].get("minutes") or (planned.bytes or 0) / plan["speeds"][name] / 60
    config = planned.run(seed, device=device, eval_every_minutes=max(minutes / LOOKS, 1e-3))
    held_out = [Path(file) for path in plan["held_out"] for file in expanded(path)]
    result = train(plan["paths"], config, run, quiet=quiet, exclude=(home, *held_out))
    if result.signal is not None or result.progress is None:
        return 128 + (result.signal or 0)
    where = use(device)
    memory, progress = peak_memory(where), result.progress
    model = load(run, where).model
    documents = ((str(number), data) for number, data in stretches)
    found = list(measure(model, documents, context=config.train.context_length))
    lines = [line for line in read_history(run / METRICS) if line["kind"] == "validation"]
    # One that was stopped after its training has looked twice at its end.
    validations = {line["bytes"]: [line["bytes"], line["seconds"], line["bits_per_byte"]] for line in lines}
    written: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "steps": progress.step,
        "skipped": progress.skipped,
        "trained_bytes": progress.bytes,
        "seconds": progress.seconds,
        "peak_memory": memory,
        "patch_size": patch_size(model, stretches),
        "generated_bytes_per_second": writing_speed(model, stretches[0][1][:PROMPT]),
        "curve": list(validations.values()),
        "documents": [[d.name, d.bytes, d.nats] for d in found],
        "threads": torch.get_num_threads(),
        "device": called(where),
    }
    write_whole(run / RESULT, json.dumps(written).encode())
    return 0


def main(job: str) -> int:
    """Do the job: JSON of what `work` takes. Why it failed is in RUN/failed.txt, and its kind is the exit code."""
    given = json.loads(job)
    home, run = Path(given.pop("home")), Path(given.pop("run"))
    failed = run / FAILED
    try:
        return work(home=home, run=run, **given)
    except BytelmError as error:
        failed.write_text(f"{error}\n", encoding="utf-8")
        return error.exit_code
    except Exception as error:
        failed.write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        raise


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
