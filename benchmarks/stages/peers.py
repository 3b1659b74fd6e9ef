"""Training steps of others at the shapes of `steps.py`: transformers' BLT, MEGABYTE-pytorch, a plain Transformer.

Forward, backward, gradient clipping, fused AdamW, bfloat16 matmuls, ids copied from the host each step. Rows are halved
until they fit into memory. share: by the FLOPs of our model. Also decode throughput of transformers' BLT, float32
weights under autocast.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from generate import PATCH, SIZES, parameters, random_prompts, recipe
from peers import transformers_blt
from train import LIKE, needed, peer, peer_step

from stages.bench import Bench, Found, Measurement, free, peak, profiled, rates, seconds
from stages.steps import SHAPES, SMALL, Shape

SECONDS, EACH = 180, 90
COLUMNS = ("rows", "window", "ms", "mb_per_s", "launches", "kernels_ms", "gib", "share", "bytes_per_s")
NEEDS = {"transformers": "transformers", "megabyte-pytorch": "MEGABYTE_pytorch", "plain": "torch"}
OURS = ("demo", "BLT 100M", "MEGABYTE 100M", "byte Transformer 127M")


def missing(system: str) -> Found | None:
    name = NEEDS[system]
    return None if importlib.util.find_spec(name) else {"skipped": f"{name} is not installed"}


def step(bench: Bench, system: str, shape: Shape) -> Found:
    shape = bench.size(shape, shape.small())
    if skipped := missing(system):
        return skipped
    _, product = rates(bench)
    own, rows = shape.recipe(), shape.rows
    while True:
        try:
            found = tried(bench, system, own.model, rows, shape.window)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        free()
    took = found["ms"] / 1e3
    operations = rows * needed(own.build_on_meta(), shape.window)
    return {"rows": rows, "window": shape.window, "mb_per_s": rows * shape.window / took / 1e6, **found} | {
        "share": operations / took / product
    }


def tried(bench: Bench, system: str, model: Any, rows: int, window: int) -> Found:
    """Time and memory of a step of so many rows."""
    torch.manual_seed(0)
    net, logits = peer(system, model)
    one = peer_step(net.to(bench.device), logits, window, rows)
    took = seconds(bench, one)
    return {"ms": 1e3 * took, "parameters": parameters(net), "gib": peak(bench), **profiled(bench, one)}


def writing(bench: Bench, rows: int, context: int) -> Found:
    """Bytes of transformers' BLT, which reads its prefix again for each: its patches given, the last logits alone."""
    shapes = bench.size(SIZES["100M"], {"blt": {k: v for k, v in SMALL["blt"].items() if k != "name"}})
    if skipped := missing("transformers"):
        return skipped
    net, write = transformers_blt(recipe(shapes, "blt").model, PATCH)
    net.to(bench.device)
    context = bench.size(context, 20)
    with torch.autocast(bench.device.type, torch.bfloat16):
        steps = write(random_prompts(rows, context), 5)
        next(steps)
        took: list[float] = []
        for _ in range(4):
            began = time.perf_counter()
            next(steps)
            bench.wait()
            took.append(time.perf_counter() - began)
    ms = 1e3 * statistics.median(took)
    return {"rows": rows, "context": context, "ms": ms, "bytes_per_s": 1e3 * rows / ms, "gib": peak(bench)}


def measurements(bench: Bench) -> Iterator[Measurement]:
    like = {model: system for system, model in LIKE.items()}
    for name in bench.size(OURS, OURS[1:]):
        shape = SHAPES[name]
        yield f"{like[shape.model['name']]}: {name}", partial(step, bench, like[shape.model["name"]], shape)
    for rows in bench.size((1, 8), (2,)):
        yield f"transformers: BLT 100M writes, {rows} x 1024", partial(writing, bench, rows, 1024)
