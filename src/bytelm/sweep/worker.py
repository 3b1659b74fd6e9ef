"""Train and measure one trial with one seed, in a separate process: peak memory and crashes are its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bytelm.checkpoint.assemble import load
from bytelm.checkpoint.metrics import METRICS, read_history
from bytelm.compare.cells import answered, settle
from bytelm.compare.held_out import kept
from bytelm.device import peak_memory, use
from bytelm.evaluate.bits import measure
from bytelm.sweep.plan import TEST, VALID, Plan
from bytelm.training.run import train


def work(home: Path, run: Path, trial: int, seed: int, share: float, device: str, quiet: bool) -> int:
    """Train and measure a trial, and write its result; 128 + signal if stopped. `share`: of the budget."""
    plan = Plan.read(home)
    budget = plan.config(trial).train.budget
    limits = {"steps": budget.steps, "bytes": budget.bytes} if share < 1 else dict[str, int | None]()
    parts = {name: max(1, round(value * share)) for name, value in limits.items() if value is not None}
    config = plan.config(trial, seed=seed, device=device, **parts)
    result = train(plan.paths, config, run, quiet=quiet, exclude=(home,))
    if result.signal is not None or result.progress is None:
        return 128 + (result.signal or 0)
    where = use(device)
    memory, progress = peak_memory(where), result.progress
    model = load(run, where).model
    written: dict[str, Any] = {
        "trial": trial,
        "seed": seed,
        "share": share,
        "steps": progress.step,
        "trained_bytes": progress.bytes,
        "seconds": progress.seconds,
        "peak_memory": memory,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": [
            [line["bytes"], line["bits_per_byte"]]
            for line in read_history(run / METRICS)
            if line["kind"] == "validation"
        ],
    }
    for name, file in (("valid", VALID), ("test", TEST)):
        documents = ((str(number), data) for number, data in kept(home / file))
        found = measure(model, documents, context=config.train.context_length)
        written[name] = [[d.name, d.bytes, d.nats] for d in found]
    settle(run, written)
    return 0


def main(job: str) -> int:
    """Run a job, the JSON arguments of `work`."""
    return answered(job, work)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
