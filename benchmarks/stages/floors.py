"""Rooflines (`roofline.py`) of the shapes of `steps.py` at measured rates, and the measured times; needs no GPU.

ms is with the kernels of a GPU, plain_ms without; times: what was measured to ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from roofline import COPY, PRODUCT, floor_of

from stages.bench import Bench, Found, Measurement, known_rates
from stages.steps import SHAPES, Shape

SECONDS, EACH = 120, 60
COLUMNS = ("ms", "plain_ms", "products_ms", "gb", "tflop", "launches", "mb_per_s", "measured_ms", "times")


def counted(bench: Bench, name: str, shape: Shape) -> Found:
    shape, rates = bench.size(shape, shape.small()), known_rates(bench) or (COPY, PRODUCT)
    plain, floor = (floor_of(shape, *rates, kernels=kernels) for kernels in (False, True))
    measured = bench.found("steps").get(name, {}).get("ms")
    ms = 1e3 * floor.seconds
    return {
        "ms": ms,
        "plain_ms": 1e3 * plain.seconds,
        "products_ms": 1e3 * floor.operations / floor.product,
        "gb": floor.bytes / 1e9,
    } | {
        "tflop": floor.operations / 1e12,
        "launches": floor.launches,
        "mb_per_s": shape.rows * shape.window / floor.seconds / 1e6,
        "measured_ms": measured,
        "times": measured and measured / ms,
        "longest": [[op, round(1e3 * took, 3)] for op, took in floor.longest[:8]],
    }


def measurements(bench: Bench) -> Iterator[Measurement]:
    for name, shape in bench.size(SHAPES, dict(list(SHAPES.items())[:4])).items():
        yield name, partial(counted, bench, name, shape)
