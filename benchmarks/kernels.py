"""Each kernel's speed, as a share of what this processor reaches in a large sgemm, or in reading memory.

    python benchmarks/kernels.py                               one thread and two; float32, bfloat16 and int8 weights
    python benchmarks/kernels.py --threads 1 --json
    BYTELM_KERNELS=x86-64-v3 python benchmarks/kernels.py      as compiled for AVX2

All kernels and both limits are measured in turn in every round; medians over rounds.

linear      a matrix of a decoder times 1, 8, 32 and 64 positions
block       a Transformer block of a decoder: 1, 8, 32 or 64 positions of one row, after 1024 others
others      what training has between matmuls, forward and backward, on 4096 positions

GFLOP/s count multiplications and additions, exponentials not; GB/s count weights, keys and values, or what is read and
written once. of sgemm: GFLOP/s by those of torch's float32 matmul of 1024 x 1024 matrices with as many threads. of
reading: GB/s by those of reading a buffer of that size (see generate.py), which a cache may hold. Above 100 % of sgemm
are processors on which torch's library does not use the widest vectors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from generate import bandwidth
from torch import Tensor

from bytelm import machine
from bytelm.decoding.host import Host
from bytelm.native import library
from bytelm.nn import fused
from bytelm.nn.transformer import Stack, StackConfig

SHAPES = {"10M": (384, 1152), "100M": (1024, 3072)}  # in, out: what makes queries, keys and values
BATCHES = (1, 8, 32, 64)
WEIGHTS = {"float32": None, "bf16": "bf16", "int8": "int8"}
HEAD_DIM, CONTEXT, SEQUENCE = 64, 1024, 4096
SGEMM = 1024
SHORTEST = 2e-3  # seconds of a measurement


@dataclass
class Measured:
    """One kernel: what it computes and moves, and how long it took."""

    kernel: str
    shape: str
    batch: int
    threads: int
    operations: float
    traffic: float
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        count, took = 1, 0.0
        while took < SHORTEST:
            began = time.perf_counter()
            for _ in range(count):
                self.call()
            took = time.perf_counter() - began
            self.seconds.append(took / count)
            if took < SHORTEST:
                self.seconds.pop()
                count = max(count + 1, int(1.5 * count * SHORTEST / max(took, 1e-6)))

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.operations / statistics.median(self.seconds)

    @property
    def flow(self) -> float:
        """Bytes per second."""
        return self.traffic / statistics.median(self.seconds)


def products(threads: int, size: str, quantize: str | None, name: str) -> Iterator[Measured]:
    given, found = SHAPES[size]
    kernels = Host.open(weights=quantize)
    kernels.thread_pool.threads = threads
    weight = torch.randn(found, given)
    matrix = kernels.matrix(weight)
    for batch in BATCHES:
        x = np.random.default_rng(0).standard_normal((batch, given), np.float32)

        def call(x: np.ndarray = x, held: Tensor = weight) -> object:  # packed as long as the weight lives
            return kernels.linear(matrix, x)

        yield Measured(
            f"linear, {name}", f"{given} x {found}", batch, threads, 2.0 * batch * given * found, matrix.bytes, call
        )


def blocks(threads: int, size: str) -> Iterator[Measured]:
    dim = SHAPES[size][0]
    kernels = Host.open()
    kernels.thread_pool.threads = threads
    stack = Stack(StackConfig(dim=dim, layers=1, heads=dim // HEAD_DIM, attention_window=None, theta=1e4))
    layers = kernels.layers(stack, 1, CONTEXT + max(BATCHES))
    hidden = stack.config.hidden()
    for batch in BATCHES:
        x = np.random.default_rng(0).standard_normal((batch, dim)).astype(np.float32)
        row, position = np.zeros(batch, np.int64), CONTEXT + np.arange(batch)

        def call(x: np.ndarray = x, row: np.ndarray = row, position: np.ndarray = position) -> object:
            return layers.run(x.copy(), row, position, row)

        seen = CONTEXT + (batch + 1) / 2
        operations = 2.0 * batch * (4 * dim * dim + 3 * dim * hidden + 2 * dim * seen)
        yield Measured(
            "block, float32", f"dim {dim}", batch, threads, operations, layers.weight_bytes + 8.0 * dim * seen, call
        )


def others(threads: int, size: str, dtype: torch.dtype) -> Iterator[Measured]:
    """The functions of nn/fused.py."""
    dim = SHAPES[size][0]
    heads, name, width = dim // HEAD_DIM, str(dtype).removeprefix("torch."), dtype.itemsize
    shape = (1, SEQUENCE, heads, HEAD_DIM)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    first = torch.zeros(1, SEQUENCE, dtype=torch.int32)
    angles = torch.randn(1, SEQUENCE, 1, HEAD_DIM // 2)
    weight = torch.ones(dim, requires_grad=True)
    pairs = SEQUENCE * (SEQUENCE + 1) / 2
    cases: list[tuple[str, Sequence[Tensor], Callable[..., Tensor], float, float]] = [
        ("attention", [made(*shape) for _ in range(3)], lambda *x: fused.attention(*x, first), 4 * dim * pairs, 4),
        ("norm", [made(SEQUENCE, dim)], lambda x: fused.rms_norm(x, weight, 1e-6), 4.0 * SEQUENCE * dim, 2),
        ("swiglu", [made(SEQUENCE, 2 * dim)], fused.swiglu, 4.0 * SEQUENCE * dim, 3),
        ("rotate", [made(*shape)], lambda x: fused.rotate(x, angles, angles), 3.0 * SEQUENCE * dim, 2),
    ]
    for kernel, given, function, operations, passes in cases:
        found = function(*given)
        gradient = torch.randn_like(found)

        def forward(function: Callable[..., Tensor] = function, given: Sequence[Tensor] = given) -> object:
            with torch.no_grad():
                return function(*given)

        def backward(found: Tensor = found, given: Sequence[Tensor] = given, gradient: Tensor = gradient) -> object:
            return torch.autograd.grad(found, given, gradient, retain_graph=True)

        moved = passes * SEQUENCE * dim * width
        more = 2.5 if kernel == "attention" else 2.0
        what = f"{SEQUENCE} x {dim}"
        yield Measured(f"{kernel}, {name}", what, SEQUENCE, threads, operations, moved, forward)
        yield Measured(f"{kernel}, back, {name}", what, SEQUENCE, threads, more * operations, 1.5 * moved, backward)


def sgemm(threads: int) -> Measured:
    left, right = torch.randn(SGEMM, SGEMM), torch.randn(SGEMM, SGEMM)
    return Measured("torch's sgemm", f"{SGEMM} x {SGEMM}", SGEMM, threads, 2.0 * SGEMM**3, 0.0, lambda: left @ right)


def measured(threads: int, sizes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    limit, table = sgemm(threads), list[Measured]()
    for size in sizes:
        for name, quantize in WEIGHTS.items():
            table += products(threads, size, quantize, name)
        table += blocks(threads, size)
        for dtype in (torch.float32, torch.bfloat16):
            if fused.ready(dtype):
                table += others(threads, size, dtype)
    flows: dict[int, list[float]] = {}
    for turn in range(rounds):
        limit.measure()
        for item in table if turn % 2 == 0 else reversed(table):
            item.measure()
        for size in {int(item.traffic) for item in table}:
            flows.setdefault(size, []).append(bandwidth(size))
    rows: list[dict[str, Any]] = []
    for item in (limit, *table):
        reading = statistics.median(flows[int(item.traffic)]) if item.traffic else 0.0
        rows.append(
            {"kernel": item.kernel, "shape": item.shape, "batch": item.batch, "threads": threads}
            | {"gflop_s": item.rate / 1e9, "gb_s": item.flow / 1e9, "of_sgemm": item.rate / limit.rate}
            | {"of_reading": item.flow / reading if reading else None}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default: %(default)s)")
    parser.add_argument("--sizes", default="10M,100M", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for threads in map(int, options.threads.split(",")):
        rows += measured(threads, options.sizes.split(","), options.rounds)
    kernels = library.described("kernels")[0]
    if options.json:
        print(json.dumps({"processor": machine.processor(), "kernels": kernels, "rows": rows}))
        return 0
    print(f"{machine.processor()}; kernels {kernels}\n")
    figures = f"{'GFLOP/s':>9}{'GB/s':>8}{'of sgemm':>10}{'of reading':>12}"
    print(f"{'kernel':<27}{'shape':<14}{'batch':>6}{'threads':>8}{figures}")
    for row in rows:
        reading = "–" if row["of_reading"] is None else f"{row['of_reading']:.0%}"
        where = f"{row['kernel']:<27}{row['shape']:<14}{row['batch']:>6}{row['threads']:>8}"
        print(f"{where}{row['gflop_s']:>9.1f}{row['gb_s']:>8.1f}{row['of_sgemm']:>10.0%}{reading:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
