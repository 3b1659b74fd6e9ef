"""Limits of the machine: memory bandwidth, matmuls, launches, synchronisation, host-device copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from stages.bench import Bench, Found, Measurement, copy_rate, product_rate, seconds

SECONDS, EACH = 30, 30
COLUMNS = ("gb_per_s", "tflop_per_s", "us")
LAUNCHES = 2000

# Rows, inner and outer width of linear layers: of the byte and the latent Transformers of steps.SHAPES.
SHAPES = {
    "BLT 100M, bytes": (131072, 512, 2816),
    "BLT 100M, patches": (26224, 1024, 5632),
    "blt-400m, patches": (6560, 1280, 6912),
    "demo, bytes": (65536, 128, 704),
    "one row": (1, 2048, 11008),
    "32 rows": (32, 2048, 11008),
}


def products(bench: Bench, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Found:
    return {"tflop_per_s": product_rate(bench, *shape, dtype=dtype) / 1e12}


def rate(bench: Bench, step: Callable[[], object], size: int) -> Found:
    return {"gb_per_s": size / seconds(bench, step) / 1e9}


def launch(bench: Bench) -> Found:
    """Microseconds of the host until a small kernel is queued, and until it has run besides."""
    x = torch.zeros(64, device=bench.device)
    count = bench.size(LAUNCHES, 20)
    x.add_(1)
    bench.wait()
    began = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    queued = time.perf_counter()
    bench.wait()
    return {"us": 1e6 * (queued - began) / count, "us_run": 1e6 * (time.perf_counter() - began) / count}


def wait(bench: Bench) -> Found:
    """Microseconds of a small kernel whose result is fetched."""
    x = torch.zeros((), device=bench.device)
    count = bench.size(LAUNCHES, 20)
    began = time.perf_counter()
    for _ in range(count):
        x.add_(1)
        float(x)
    return {"us": 1e6 * (time.perf_counter() - began) / count}


def copied(bench: Bench, pinned: bool, back: bool, size: int) -> Found:
    """A buffer of the host copied to the device, or back."""
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned and bench.cuda)
    device = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    source, target = (device, host) if back else (host, device)
    return rate(bench, lambda: target.copy_(source, non_blocking=True), size)


def graph(bench: Bench) -> Found:
    """Microseconds a small kernel of a CUDA graph of a hundred."""
    if not bench.cuda:
        return {"us": None}
    x = torch.zeros(64, device=bench.device)
    x.add_(1)
    bench.wait()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for _ in range(100):
            x.add_(1)
    return {"us": 1e6 * seconds(bench, recorded.replay) / 100}


def measurements(bench: Bench) -> Iterator[Measurement]:
    yield "copy", lambda: {"gb_per_s": copy_rate(bench) / 1e9}
    yield "product bf16 8192", partial(products, bench)
    yield "product float32 4096", partial(products, bench, 4096, 4096, 4096, dtype=torch.float32)
    for name, shape in SHAPES.items():
        yield f"product, {name}", partial(products, bench, *shape)
    yield "launch", partial(launch, bench)
    yield "launch in a graph", partial(graph, bench)
    yield "wait", partial(wait, bench)
    large, small = bench.size(1 << 28, 1 << 12), bench.size(1 << 20, 1 << 10)
    for name, size in (("large", large), ("1 MiB", small)):
        yield f"to the device, pinned, {name}", partial(copied, bench, True, False, size)
        yield f"to the device, pageable, {name}", partial(copied, bench, False, False, size)
        yield f"to the host, pinned, {name}", partial(copied, bench, True, True, size)
