"""Results of a comparison, from the results of its runs: one mapping (JSON), and rows of a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bytelm.compare.held_out import kept, units
from bytelm.compare.plan import TRAINING, Planned
from bytelm.compare.run import Outcome
from bytelm.compare.worker import HELD_OUT
from bytelm.data.corpus import Corpus
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.compressors import compressed
from bytelm.evaluate.meter import Meter, interval
from bytelm.machine import processor
from bytelm.units import bits_per_byte, show_bytes, show_count, show_seconds

Result = Mapping[str, Any]
COSTS = (
    *("entropy_model", "paper", "executed", "hnet", "read", "trained_bytes", "epochs", "training_flops", "steps"),
    *("skipped", "seconds", "training_bytes_per_second", "generated_bytes_per_second", "peak_memory"),
)
"""What a model has that was trained here."""


def averaged(results: Sequence[Result]) -> list[DocumentBits]:
    """Bits of each segment, averaged over the seeds of a model."""
    rows = zip(*(result["documents"] for result in results), strict=True)
    return [DocumentBits(row[0][0], row[0][1], fmean(nats for _, _, nats in row)) for row in rows]


def difference(one: Sequence[DocumentBits], other: Sequence[DocumentBits]) -> dict[str, float | None]:
    """Paired difference in bits per byte of one model to another, with its 95 % interval.

    The differences of documents are resampled, so that documents that are hard for both do not widen the interval.
    """
    pairs = zip(one, other, strict=True)
    apart = [DocumentBits(a.name, a.bytes, a.nats - b.nats) for a, b in pairs]
    bounds = interval(units(apart))
    low, high = bounds or (None, None)
    return {"difference": Meter.of(apart).bits_per_byte, "low": low, "high": high}


def summary(outcome: Outcome, home: Path) -> dict[str, Any]:
    """Everything, as JSON: models from best to worst, and all pairs of them."""
    corpus, plan = Corpus.open(home / "data"), outcome.plan
    of: dict[str, list[Result]] = {}
    for result in outcome.results:
        of.setdefault(result["model"], []).append(result)
    foreign = {result["model"]: result for result in outcome.foreign}
    measured = {name: averaged(results) for name, results in of.items()}
    measured |= {name: averaged([result]) for name, result in foreign.items()}
    order = sorted(measured, key=lambda name: Meter.of(measured[name]).bits_per_byte)
    found = [
        foreign_of(foreign[name], measured[name])
        if name in foreign
        else model_of(Planned.of(plan["models"][name]), of[name], measured[name], corpus.bytes("train"))
        for name in order
    ]
    pairs = [{"model": a, "baseline": b, **difference(measured[a], measured[b])} for a, b in combinations(order, 2)]
    stretches = [data for _, data in kept(home / HELD_OUT)]
    asked = {key: plan[key] for key in ("paths", "held_out", "match", "budget", "modality")}
    return {
        **asked,
        "models": found,
        "differences": pairs,
        "failed": outcome.failed,
        "compressors": compressed(stretches),
        "measured_bytes": sum(map(len, stretches)),
        "train_bytes": corpus.bytes("train"),
        "machine": machine([*outcome.results, *outcome.foreign]),
    }


def machine(results: Iterable[Result]) -> dict[str, Any]:
    """The machine."""
    threads = sorted({result["threads"] for result in results})
    kinds = sorted({result.get("device", processor()) for result in results})
    return {"device": ", ".join(kinds), "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def model_of(
    planned: Planned, results: Sequence[Result], measured: Sequence[DocumentBits], train_bytes: int
) -> dict[str, Any]:
    """One model; figures are means over seeds."""

    def mean(key: str) -> float:
        return fmean(result[key] for result in results)

    counted = planned.costs
    each = [bits_per_byte(sum(d[2] for d in r["documents"]), sum(d[1] for d in r["documents"])) for r in results]
    curve = [
        {"bytes": bytes, "flops": TRAINING * counted.executed * bytes, "seconds": seconds, "bits_per_byte": bits}
        for bytes, seconds, bits in results[0]["curve"]
    ]
    return {
        "model": planned.name,
        **level(measured),
        "seeds": {result["seed"]: bits for result, bits in zip(results, each, strict=True)},
        **asdict(counted),
        "patch_size": results[0]["patch_size"],
        "trained_bytes": mean("trained_bytes"),
        "epochs": mean("trained_bytes") / train_bytes,
        "training_flops": TRAINING * counted.executed * mean("trained_bytes"),
        "steps": mean("steps"),
        "skipped": mean("skipped"),
        "seconds": mean("seconds"),
        "training_bytes_per_second": mean("trained_bytes") / max(1e-9, mean("seconds")),
        "generated_bytes_per_second": mean("generated_bytes_per_second"),
        "peak_memory": mean("peak_memory"),
        "curve": curve,
        "config": planned.config,
    }


def level(measured: Sequence[DocumentBits]) -> dict[str, Any]:
    """Bits per byte, with their interval, as JSON."""
    whole, bounds = Meter.of(measured), interval(units(measured))
    low, high = bounds or (None, None)
    return {"bytes": whole.bytes, "bits_per_byte": whole.bits_per_byte, "low": low, "high": high}


def foreign_of(result: Result, measured: Sequence[DocumentBits]) -> dict[str, Any]:
    """A model of transformers: what a training costs is None, and what its tokens lose is beside its bits."""
    shown = {key: result[key] for key in ("parameters", "tables", "patch_size")}
    unknown = dict.fromkeys(COSTS)
    about = {key: result[key] for key in result if key not in {*shown, "model", "documents", "threads", "device"}}
    return {
        "model": result["model"],
        **level(measured),
        "seeds": {},
        **shown,
        **unknown,
        "curve": [],
        "config": None,
        "foreign": about,
    }


def lost(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know of models whose tokens do not give back all bytes, line by line."""
    models = [(model["model"], model["foreign"]["lost"]) for model in found["models"] if "foreign" in model]
    return [line if at else f"{name}: {line}" for name, lines in models for at, line in enumerate(lines)]


# --- tables -----------------------------------------------------------------------------------------------------------

HEAD = [
    "model",
    "bits/byte",
    "95 % CI",
    "seeds",
    "difference to best",
    "patch (bytes)",
    "non-embedding",
    "embedding parameters",
]
HEAD_COSTS = [
    "MFLOPs/byte: paper",
    "executed",
    "H-Net",
    "training bytes",
    "time",
    "train throughput",
    "decode throughput",
    "peak memory",
]


def interval_of(low: float | None, high: float | None) -> str:
    """An interval as text."""
    return "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row per model, under HEAD and HEAD_COSTS."""
    models = found["models"]
    apart = (
        {pair["baseline"]: pair for pair in found["differences"] if pair["model"] == models[0]["model"]}
        if models
        else {}
    )
    return [_row(model, apart.get(model["model"])) for model in models]


def _row(model: Mapping[str, Any], apart: Mapping[str, Any] | None) -> list[str]:
    seeds, own = list(model["seeds"].values()), model.get("foreign")
    spread = f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "–" if own else "1"
    bits = f"{model['bits_per_byte']:.3f}"
    more = "–"
    if apart is not None:
        low, high = (None if apart[end] is None else -apart[end] for end in ("high", "low"))
        more = f"{-apart['difference']:+.3f} ({interval_of(low, high)})"
    return [
        model["model"],
        bits if own is None or own["exact"] else f"{bits} (at most {own['bits_per_byte_bound']:.3f})",
        interval_of(model["low"], model["high"]),
        spread,
        more,
        "–" if model["patch_size"] is None else f"{model['patch_size']:.2f}",
        show_count(model["parameters"] - model["tables"]),
        show_count(model["tables"]),
        *(["–"] * len(HEAD_COSTS) if own else _costs(model)),
    ]


def _costs(model: Mapping[str, Any]) -> list[str]:
    return [
        *(f"{model[key] / 1e6:.3g}" for key in ("paper", "executed", "hnet")),
        f"{show_bytes(model['trained_bytes'])}",
        show_seconds(model["seconds"]),
        f"{show_bytes(model['training_bytes_per_second'])}/s",
        f"{show_bytes(model['generated_bytes_per_second'])}/s",
        show_bytes(model["peak_memory"]),
    ]
