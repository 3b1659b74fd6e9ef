"""Greedy generation on the device compared with the CPU in float32, after five prompts.

Where they diverge: the gap of the two most likely bytes, as near ties may fall either way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import generate
import torch
from identity import PROMPTS, alone, difference, written

from bytelm.decoding import open_decoder
from bytelm.interfaces.model import ByteModel
from stages.bench import Bench, Found, Measurement
from stages.steps import Shape

SECONDS, EACH = 40, 60
COLUMNS = ("bytes", "same", "in_company", "decoder")
BYTES = 256
MODELS = ("blt", "megabyte", "transformer")


def measured(bench: Bench, kind: str) -> Found:
    shape = Shape({"name": kind, **generate.SIZES["10M"][kind]}, 1, 1)
    model: ByteModel = bench.size(shape, shape.small()).recipe().build()
    model.init_weights(0)
    model.eval().requires_grad_(False)
    there, count = copy.deepcopy(model).to(bench.device), bench.size(BYTES, 8)
    capacity = 1 + max(map(len, PROMPTS)) + count
    base = alone(lambda: open_decoder(model, rows=1, capacity=capacity), PROMPTS, count)
    one = alone(lambda: open_decoder(there, rows=1, capacity=capacity), PROMPTS, count)
    decoder = open_decoder(there, rows=len(PROMPTS), capacity=capacity)
    company = written(decoder, PROMPTS, count).texts
    where = difference(model, PROMPTS, base, one)
    return {"bytes": count * len(PROMPTS), "same": not where, "in_company": company == one, "where": where} | {
        "decoder": type(decoder).__name__,
        "float32": torch.get_float32_matmul_precision(),
    }


def measurements(bench: Bench) -> Iterator[Measurement]:
    for kind in MODELS:
        yield kind, partial(measured, bench, kind)
