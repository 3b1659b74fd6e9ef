"""What an online memory adds to each run of a comparison: begun empty, it reads the held-out segments beside the model.

RUN/online.json      what was measured of one run, which is not measured again
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from bytelm.checkpoint.assemble import load
from bytelm.compare.held_out import kept
from bytelm.compare.run import Outcome, folder_of
from bytelm.compare.worker import HELD_OUT
from bytelm.data.files import write_whole
from bytelm.decoding import over_bytes
from bytelm.decoding.bytewise import over_bytes_context
from bytelm.device import use
from bytelm.evaluate.bits import measure
from bytelm.online.kinds import suited
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.report.markup import Table
from bytelm.units import LN2

ONLINE = "online.json"


def ask(outcome: Outcome, device: str, watch: Callable[[str, int], Callable[[int], None] | None]) -> dict[str, Any]:
    """Bits per byte of all runs with a memory of the default size, and those of the memory alone, as JSON.

    {"memory": its bytes, "alone": bits per byte, "models": [{"model", "bits_per_byte", "online", "seeds"}]}: means over
    the seeds, and each seed's with a memory. Models of tokens are read through their exact probabilities of bytes,
    about a step per byte, of which "bits_per_byte" is then: a little below that of their usual tokens.
    """
    segments = [data for _, data in kept(outcome.home / HELD_OUT)]
    size, empty = sum(map(len, segments)), Memory(suited(b"".join(segments)))
    alone = sum(float(empty.nats(data).sum()) for data in segments) / LN2 / size
    found: dict[str, list[dict[str, Any]]] = {}
    for result in outcome.results:
        run = outcome.home / folder_of(result["model"], result["seed"], result.get("factor", 1.0))
        if not (run / ONLINE).exists():
            measured = of_run(run, segments, empty.settings, device, watch(f"{run.name} beside a memory", size))
            write_whole(run / ONLINE, json.dumps(measured).encode())
        own = json.loads((run / ONLINE).read_text(encoding="utf-8"))
        found.setdefault(result["model"], []).append({"seed": result["seed"], **own})
    return {"memory": empty.bytes, "alone": alone, "models": [model(name, runs) for name, runs in found.items()]}


def of_run(
    run: Path, segments: list[bytes], settings: Settings, device: str, progress: Callable[[int], None] | None
) -> dict[str, float]:
    """Bits per byte of one run, by itself and with a memory."""
    loaded = load(run, use(device))
    context = over_bytes_context(loaded.model, int(loaded.state["context"]))
    documents = ((str(number), data) for number, data in enumerate(segments))
    memory = Memory(settings)
    beside = measure(over_bytes(loaded.model), documents, context=context, memory=memory, progress=progress)
    bytes, nats, both = 0, 0.0, 0.0
    for document in beside:
        bytes, nats, both = bytes + document.bytes, nats + document.nats, both + (document.online or 0.0)
    return {"bits_per_byte": nats / LN2 / bytes, "online": both / LN2 / bytes}


def model(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a model over its runs."""
    means = {key: fmean(run[key] for run in runs) for key in ("bits_per_byte", "online")}
    return {"model": name, **means, "seeds": {str(run["seed"]): run["online"] for run in runs}}


def table(found: Mapping[str, Any]) -> Table:
    """A row per model, from best to worst with a memory, and the memory alone."""
    own = found["online"]
    rows = [
        [one["model"], f"{one['bits_per_byte']:.3f}", cell(one), f"{one['online'] - one['bits_per_byte']:+.3f}"]
        for one in sorted(own["models"], key=lambda one: one["online"])
    ]
    return Table(
        ["model", "by itself", "with a memory", "difference"],
        [*rows, ["the memory alone", "", f"{own['alone']:.3f}", ""]],
    )


def cell(one: Mapping[str, Any]) -> str:
    """The figure with a memory, with the lowest and the highest seed where there are several."""
    seeds = one["seeds"].values()
    return f"{one['online']:.3f}" + (f" ({min(seeds):.3f} to {max(seeds):.3f})" if len(seeds) > 1 else "")
