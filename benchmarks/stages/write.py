"""Decode throughput in bfloat16 with random weights: MEGABYTE's headline pair, BLT-1B, BLT 100M.

Rows read random bytes up to a context, then generate: 16 bytes of warm-up, then the median of three times 16. ms: per
byte in every row; share: fraction of the bandwidth roofline (weights, keys and values at copy bandwidth). transformers'
BLT at the shape of the last is in `peers.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from generate import PATCH, SIZES, random_prompts
from headline import PAIR

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, preset
from bytelm.decoding import Decoder, open_decoder
from bytelm.units import BOS
from stages.bench import Bench, Found, Measurement, peak, profiled, random_model, rates, waited
from stages.steps import SMALL

SECONDS, EACH = 100, 60
COLUMNS = ("rows", "context", "ms", "bytes_per_s", "launches", "waits", "mb", "share", "gib", "decoder")
LAST = 8000  # ids: the pair knows 8192 positions
STRETCH, STRETCHES = 16, 3  # two patches of 8; three and a byte of 5

FIXED: dict[str, Any] = {"patching": {"name": "fixed", "size": PATCH}}
# An entropy model that is called for every byte, and patches that are equally long all the same.
SCORED: dict[str, Any] = {"patching": {"name": "entropy", "threshold": 100.0, "max_length": PATCH}}
BLT_1B = preset("blt-1b")


def tables(bench: Bench, model: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    small = {"entropy_model": {"name": "transformer", "layers": 1, "dim": 16, "heads": 2, "attention_window": 16}}
    return {**more, "model": model} | bench.size(
        {}, {"model": SMALL[model["name"]]} | (small if "entropy_model" in more else {})
    )


def read_to(decoder: Decoder, context: int) -> None:
    """Rows that have read BOS and random bytes, so many ids in all."""
    prompts = np.array([[BOS, *prompt] for prompt in random_prompts(decoder.rows, context - 1)])
    for start in range(0, context, decoder.chunk):
        part = prompts[:, start : start + decoder.chunk]
        decoder.read(np.repeat(np.arange(decoder.rows), part.shape[1]), part.flatten())


def stretch(decoder: Decoder) -> float:
    """Seconds a byte in each row, each the likeliest after the one before."""
    rows = np.arange(decoder.rows)
    ids = np.full(decoder.rows, ord(" "))
    began = time.perf_counter()
    for _ in range(STRETCH):
        ids = decoder.read(rows, ids)[:, :256].argmax(1)
    return (time.perf_counter() - began) / STRETCH


def ours(bench: Bench, mapping: dict[str, Any], rows: int, context: int) -> Found:
    context = bench.size(context, 70)
    model = random_model(bench, build(Recipe, mapping, "benchmark"), bench.size(torch.bfloat16, torch.float32))
    decoder = open_decoder(model.eval().requires_grad_(False), rows=rows, capacity=context + 8 * STRETCH)
    began = time.perf_counter()
    read_to(decoder, context)
    reading, context = time.perf_counter() - began, int(decoder.lengths.min())
    stretch(decoder)
    took = statistics.median(stretch(decoder) for _ in range(bench.size(STRETCHES, 1)))
    seen = {**profiled(bench, partial(stretch, decoder)), **waited(bench, partial(stretch, decoder))}
    moved, (copy, _) = decoder.traffic(context), rates(bench)
    each = {key: seen[key] / STRETCH for key in ("launches", "waits", "syncs", "kernels_ms")}
    return (
        {"rows": rows, "context": context, "ms": 1e3 * took, "bytes_per_s": rows / took, "mb": moved / 1e6}
        | each
        | {
            "share": moved / copy / took,
            "prompt_bytes_per_s": rows * context / reading,
            "gib": peak(bench),
            "decoder": type(decoder).__name__,
            "where": seen["where"],
            "top": seen["top"],
        }
    )


def measurements(bench: Bench) -> Iterator[Measurement]:
    def case(name: str, mapping: dict[str, Any], rows: int, context: int) -> Measurement:
        return f"{name}, {rows} x {context}", partial(ours, bench, mapping, rows, context)

    pair = {name: tables(bench, model, {}) for name, model in PAIR.items()}
    for rows, context in bench.size([(1, 1024), (32, 1024), (1, LAST), (1, 4096), (32, LAST)], [(2, 1024)]):
        for name, mapping in pair.items():
            yield case(name, mapping, rows, context)
    scored = SCORED | {"entropy_model": BLT_1B["entropy_model"]}
    for name, more in (("BLT-1B", FIXED), ("BLT-1B with its scorer", scored)):
        for rows in bench.size((1, 8, 32), (2,)):
            yield case(name, tables(bench, BLT_1B["model"], more), rows, 1024)
    for rows in bench.size((1, 8), (2,)):
        yield case("BLT 100M", tables(bench, {"name": "blt", **SIZES["100M"]["blt"]}, FIXED), rows, 1024)
