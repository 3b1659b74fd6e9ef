"""Results of a comparison, from the results of its runs: one mapping (JSON), and rows of a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from bytelm.compare.cells import Failure
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


T975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Quantiles at 0.975 of Student's t with 1, 2, ... degrees of freedom; with more than these the normal one's 1.96."""


def averaged(results: Sequence[Result]) -> list[DocumentBits]:
    """Bits of each segment, averaged over the seeds of a model."""
    rows = zip(*(result["documents"] for result in results), strict=True)
    return [DocumentBits(row[0][0], row[0][1], fmean(nats for _, _, nats in row)) for row in rows]


def of_seeds(*models: Sequence[float]) -> float | None:
    """Half the 95 % interval of a mean over seeds, or of the difference of two, from the variance among each's seeds.

    None where no model has two: nothing is known of what another seed gives.
    """
    freedom = sum(len(seeds) - 1 for seeds in models)
    if freedom < 1:
        return None
    pooled = sum((bits - fmean(seeds)) ** 2 for seeds in models for bits in seeds) / freedom
    quantile = T975[freedom - 1] if freedom <= len(T975) else 1.96
    return quantile * math.sqrt(pooled * sum(1 / len(seeds) for seeds in models))


def widened(middle: float, bounds: tuple[float, float] | None, more: float | None) -> dict[str, float | None]:
    """An interval over documents, to which an independent deviation of up to `more` is added in quadrature."""
    low, high = bounds or (None, None)
    if low is None or high is None or more is None:
        return {"low": low, "high": high}
    return {"low": middle - math.hypot(middle - low, more), "high": middle + math.hypot(high - middle, more)}


def difference(
    one: Sequence[DocumentBits], other: Sequence[DocumentBits], *seeds: Sequence[float]
) -> dict[str, float | None]:
    """Paired difference in bits per byte of one model to another, with its 95 % interval over documents and seeds.

    The differences of documents are resampled, so that documents that are hard for both do not widen the interval;
    `seeds`: the bits per byte of each seed of both models. With one each, the interval is over documents alone.
    """
    pairs = zip(one, other, strict=True)
    apart = [DocumentBits(a.name, a.bytes, a.nats - b.nats) for a, b in pairs]
    middle = Meter.of(apart).bits_per_byte
    return {"difference": middle, **widened(middle, interval(units(apart)), of_seeds(*seeds))}


def bits_of(result: Result) -> float:
    """Bits per byte of one run on the held-out segments."""
    documents = result["documents"]
    return bits_per_byte(math.fsum(d[2] for d in documents), sum(d[1] for d in documents))


def summary(outcome: Outcome) -> dict[str, Any]:
    """Everything, as JSON: models from best to worst, and all pairs of them."""
    home, plan = outcome.home, outcome.plan
    corpus = Corpus.open(home / "data")
    of: dict[str, list[Result]] = {}
    diverged = {key: failure.reason for key, failure in outcome.failures.items() if failure.diverged}
    for result in outcome.results:
        if failure := Failure.of_bits(bits_of(result)):
            diverged[result["model"], result["seed"]] = failure.reason
        else:
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
    seeds = {name: [bits_of(result) for result in of.get(name, ())] or [0.0] for name in order}
    pairs = [
        {"model": a, "baseline": b, **difference(measured[a], measured[b], seeds[a], seeds[b])}
        for a, b in combinations(order, 2)
    ]
    stretches = [data for _, data in kept(home / HELD_OUT)]
    asked = {key: plan[key] for key in ("paths", "held_out", "match", "budget", "modality")}
    return {
        **asked,
        "models": found,
        "differences": pairs,
        "failed": outcome.failed,
        "diverged": diverged_of(diverged),
        "unsuited": plan["unsuited"],
        "rates": outcome.rates,
        "compressors": compressed(stretches),
        "measured_bytes": sum(map(len, stretches)),
        "train_bytes": corpus.bytes("train"),
        "machine": machine([*outcome.results, *outcome.foreign]),
    }


def diverged_of(found: Mapping[tuple[str, int], str]) -> dict[str, dict[str, str]]:
    """{model: {seed: why it counts as diverged}}."""
    models: dict[str, dict[str, str]] = {}
    for (name, seed), reason in found.items():
        models.setdefault(name, {})[str(seed)] = reason
    return models


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
    each = list(map(bits_of, results))
    curve = [
        {"bytes": bytes, "flops": TRAINING * counted.executed * bytes, "seconds": seconds, "bits_per_byte": bits}
        for bytes, seconds, bits in results[0]["curve"]
    ]
    return {
        "model": planned.name,
        **level(measured, each),
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
        "config": planned.at_rate(results[0].get("factor", 1.0)),
    }


def level(measured: Sequence[DocumentBits], seeds: Sequence[float] = ()) -> dict[str, Any]:
    """Bits per byte, with their interval over documents and seeds, as JSON."""
    whole, bits = Meter.of(measured), Meter.of(measured).bits_per_byte
    return {"bytes": whole.bytes, "bits_per_byte": bits, **widened(bits, interval(units(measured)), of_seeds(seeds))}


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
    named = {model["model"] for model in models}
    none = len(HEAD) + len(HEAD_COSTS) - 4
    return [
        *(_row(model, apart.get(model["model"]), len(found["diverged"].get(model["model"], ()))) for model in models),
        *(
            [name, "diverged", "–", f"0 of {len(seeds)}", *["–"] * none]
            for name, seeds in found["diverged"].items()
            if name not in named
        ),
    ]


def _row(model: Mapping[str, Any], apart: Mapping[str, Any] | None, diverged: int) -> list[str]:
    seeds, own = list(model["seeds"].values()), model.get("foreign")
    spread = f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "–" if own else "1"
    spread += f", {diverged} diverged" if diverged else ""
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
