"""Training steps of others at the shapes of `steps.py`: transformers' BLT, MEGABYTE-pytorch, a plain Transformer.

Forward, backward, gradients clipped, AdamW (fused), products in bfloat16, ids copied from the host each step. Where the
rows of ours do not fit into memory they are halved until they do. share: by the operations of our model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from generate import parameters
from train import LIKE, needed, peer, peer_step

from stages.bench import Bench, Found, Measurement, free, peak, profiled, rates, seconds
from stages.steps import SHAPES, Shape

SECONDS, EACH = 180, 90
COLUMNS = ("rows", "window", "ms", "mb_per_s", "launches", "kernels_ms", "gib", "share")
NEEDS = {"transformers": "transformers", "megabyte-pytorch": "MEGABYTE_pytorch", "plain": "torch"}
OURS = ("demo", "BLT 100M", "MEGABYTE 100M", "byte Transformer 127M")


def step(bench: Bench, system: str, shape: Shape) -> Found:
    shape = bench.size(shape, shape.small())
    if importlib.util.find_spec(NEEDS[system]) is None:
        return {"skipped": f"{NEEDS[system]} is not installed"}
    _, product = rates(bench)
    recipe, rows = shape.recipe(), shape.rows
    while True:
        try:
            found = tried(bench, system, recipe.model, rows, shape.window)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        free()
    took = found["ms"] / 1e3
    operations = rows * needed(recipe.blank(), shape.window)
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


def measurements(bench: Bench) -> Iterator[Measurement]:
    like = {model: system for system, model in LIKE.items()}
    for name in bench.size(OURS, OURS[1:]):
        shape = SHAPES[name]
        yield f"{like[shape.model['name']]}: {name}", partial(step, bench, like[shape.model["name"]], shape)
