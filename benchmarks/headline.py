"""MEGABYTE's decode throughput (paper, Table 5: 8192 bytes in 93 s at 1.3B + 218M, in 132 s by a 350M Transformer).

    python benchmarks/headline.py                  both, bf16, at contexts up to 8192, one document and eight at a time
    python benchmarks/headline.py --quantize int8
    python benchmarks/headline.py --whole 8192     also 8192 bytes from an empty context
    python benchmarks/headline.py --json

Weights are random. Both models use the same kernels. Caches before a measured segment are filled instead of computed:
the time does not depend on their values. Systems alternate; medians.

ms: per byte in every row. floor_share: fraction of the bandwidth roofline, the time to read a step's weights and caches
by the step's time; bandwidth is the best of several reductions over 512 MiB just before and after, as a shared machine
varies. The time of a complete generation is integrated over contexts (trapezoids). Two ratios: Transformer ms /
MEGABYTE ms as measured, and of the bytes that each reads, which is the ratio at the bandwidth limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, preset
from bytelm.decoding import Decoder, open_decoder
from bytelm.decoding.stacks import Layers
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.model import ByteModel
from bytelm.units import BOS

LIMIT = 8192  # ids of a document
POINTS = (0, 1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192)  # contexts of the integration
STEPS = 16  # bytes of a measured segment: two patches
ROOF = 1 << 29
PAPER = 132 / 93
GREEDY = Sampling(temperature=0.0)

PAIR: dict[str, dict[str, Any]] = {
    "transformer 350M": {"name": "transformer", "layers": 24, "dim": 1024, "heads": 16, "ffn_multiple": 256},
    "megabyte 1.3B + 218M": preset("megabyte-text-1.3b-218m")["model"],
}


def random_model(mapping: dict[str, Any]) -> ByteModel:
    """A model with random weights, in bfloat16 from the start to halve memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = build(Recipe, {"model": mapping}, "benchmark").build()
        model = model.to_empty(device="cpu")
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            noise = torch.randint(-99, 100, parameter.shape, generator=generator, dtype=torch.int8)
            parameter.data.copy_(noise).mul_(3e-4)
    return model.eval().requires_grad_(False)


def stand_at(decoder: Decoder, length: int) -> None:
    """As if every row had read so many ids; with small numbers in caches, so that their pages are allocated."""
    for layers in (part for part in vars(decoder).values() if isinstance(part, Layers)):
        for cache in layers.arrays:
            if cache.ndim > 2:
                cache[...] = 0x3C00 if cache.dtype == np.uint16 else 0.01
    decoder.ids[:] = ord("x")
    decoder.ids[:, 0] = BOS
    decoder.lengths[:] = length


def roof(buffer: torch.Tensor) -> float:
    """Memory bandwidth: the best of several reductions, in bytes per second."""
    best = float("inf")
    for read in (buffer.sum, buffer.amax, buffer.view(torch.int32).amax, buffer.sum, buffer.amax):
        began = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best


@dataclass
class Place:
    """One model at one context and batch size."""

    model: str
    context: int
    decoder: Decoder
    took: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def traffic(self) -> float:
        return self.decoder.traffic(max(1, self.context))

    def measure(self, steps: int, buffer: torch.Tensor) -> None:
        decoder = self.decoder
        stand_at(decoder, min(self.context, LIMIT - steps) if self.context else 0)
        rows = np.arange(decoder.rows)
        ids = np.full(decoder.rows, ord("x") if self.context else BOS)
        before = roof(buffer)
        began = time.perf_counter()
        for _ in range(steps):
            logits = decoder.read(rows, ids)
            ids = GREEDY.choose(logits, np.zeros(len(rows), np.uint64), decoder.lengths)
        self.took.append((time.perf_counter() - began) / steps)
        self.memory.append(max(before, roof(buffer)))

    def row(self) -> dict[str, Any]:
        ms = 1e3 * statistics.median(self.took)
        share = statistics.median(self.traffic / m / t for m, t in zip(self.memory, self.took, strict=True))
        what = {"model": self.model, "batch": self.decoder.rows, "context": self.context}
        return {**what, "ms": ms, "bytes_per_s": 1e3 * self.decoder.rows / ms, "mb": self.traffic / 1e6} | {
            "floor_share": share
        }


def places(models: dict[str, ByteModel], options: argparse.Namespace) -> Iterator[list[Place]]:
    """Groups of measurements: all contexts at batch 1, then short and long ones at larger batches."""
    for batch in options.batches:
        opened = {
            name: open_decoder(model, rows=batch, capacity=LIMIT, quantize=options.quantize)
            for name, model in models.items()
        }
        points = POINTS if batch == 1 else (1024, LIMIT)
        yield [Place(name, context, decoder) for context in points for name, decoder in opened.items()]


def whole(decoder: Decoder, count: int) -> float:
    """Seconds to generate so many bytes from an empty context."""
    row, ids = np.zeros(1, np.int64), np.array([BOS])
    decoder.rollback(row, row)
    began = time.perf_counter()
    for _ in range(count):
        ids = GREEDY.choose(decoder.read(row, ids), np.zeros(1, np.uint64), decoder.lengths)
    return time.perf_counter() - began


def integrated(rows: Sequence[dict[str, Any]], model: str, what: str) -> float:
    """Over a generation of LIMIT bytes at batch 1: seconds, or gigabytes read."""
    points = [(row["context"], row[what] / 1e3) for row in rows if row["model"] == model and row["batch"] == 1]
    return sum((b - a) * (one + other) / 2 for (a, one), (b, other) in pairwise(points))


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Ratios of the Transformer to MEGABYTE, as measured and by bytes read."""
    found: dict[str, dict[str, float]] = {}
    plain, ours = names
    if any(row["batch"] == 1 for row in rows):
        seconds, moved = ([integrated(rows, name, what) for name in names] for what in ("ms", "mb"))
        found[f"whole generation of {LIMIT} bytes"] = {
            "measured": seconds[0] / seconds[1],
            "moved": moved[0] / moved[1],
        }
    by = {(row["model"], row["batch"], row["context"]): row for row in rows}
    for model, batch, context in by:
        if model == plain and context in (1024, LIMIT):
            one, other = by[plain, batch, context], by[ours, batch, context]
            ratio = {"measured": one["ms"] / other["ms"], "moved": one["mb"] / other["mb"]}
            found[f"context {context}, batch {batch}"] = ratio
    return found


def show(rows: Sequence[dict[str, Any]], found: dict[str, dict[str, float]], memory: float) -> None:
    print(f"memory: {memory / 1e9:.1f} GB/s, {torch.get_num_threads()} threads\n")
    print(f"{'model':<24}{'batch':>6}{'context':>9}{'ms/byte':>10}{'bytes/s':>10}{'MB read':>10}{'roofline':>10}")
    for row in rows:
        figures = f"{row['ms']:>10.2f}{row['bytes_per_s']:>10.1f}{row['mb']:>10.0f}{row['floor_share']:>10.0%}"
        print(f"{row['model']:<24}{row['batch']:>6}{row['context']:>9}{figures}")
    print(f"\n{'Transformer / MEGABYTE':<40}{'measured':>10}{'moved':>10}   (paper, whole generation: {PAPER:.2f})")
    for name, ratio in found.items():
        print(f"{name:<40}{ratio['measured']:>10.2f}{ratio['moved']:>10.2f}")


def main(arguments: Sequence[str] | None = None, pair: dict[str, dict[str, Any]] = PAIR, steps: int = STEPS) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantize", choices=("bf16", "int8"), default="bf16")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole", type=int, default=0, help="bytes that both also generate from an empty context")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    models = {name: random_model(mapping) for name, mapping in pair.items()}
    rows: list[dict[str, Any]] = []
    memory: list[float] = []
    buffer = torch.ones(ROOF // 4)
    for table in places(models, options):
        for turn in range(options.rounds):
            for place in table if turn % 2 == 0 else reversed(table):
                place.measure(steps, buffer)
            print(f"batch {table[0].decoder.rows}: round {turn + 1} of {options.rounds}", file=sys.stderr)
        memory += [found for place in table for found in place.memory]
        rows += [place.row() for place in table]
    found = summary(rows, list(pair))
    if options.whole:
        opened = [open_decoder(model, rows=1, capacity=LIMIT, quantize=options.quantize) for model in models.values()]
        took = [whole(decoder, options.whole) for decoder in opened]
        found[f"{options.whole} bytes in a row, {took[0]:.0f} and {took[1]:.0f} s"] = {
            "measured": took[0] / took[1],
            "moved": float("nan"),
        }
    if options.json:
        print(json.dumps({"rows": rows, "ratios": found, "memory_gb_per_s": statistics.median(memory) / 1e9}))
    else:
        show(rows, found, statistics.median(memory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
