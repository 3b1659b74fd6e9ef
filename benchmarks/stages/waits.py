"""Where the host waits for the GPU: a training step and 20 written bytes of every small model, by file and line.

waits, where: as `torch.cuda.set_sync_debug_mode` tells. syncs: calls of cudaStreamSynchronize and the like, which a
profiler counts; pageable: copies from or to memory that is not pinned, which wait though that mode does not tell.
A training step is to wait once, and a written byte once, twice where a Transformer cuts its patches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from bytelm.decoding import open_decoder
from bytelm.interfaces.model import ByteModel
from bytelm.testing import tiny_models
from bytelm.units import BOS
from stages.bench import Bench, Found, Measurement, in_turn, profiled, waited
from stages.steps import trainer

SECONDS, EACH = 80, 30
COLUMNS = ("waits", "syncs", "pageable", "launches")
WRITTEN = 20


def measured(bench: Bench, step: Callable[[], object], each: int = 1) -> Found:
    """What one of so many things that a step does takes."""
    step()
    seen, told = profiled(bench, step), waited(bench, step)
    counts = {key: (seen | told)[key] / each for key in COLUMNS}
    return {**counts, "where": {line: count / each for line, count in told["where"].items()}, "top": seen["top"]}


def training(bench: Bench, model: ByteModel) -> Found:
    with trainer(bench, copy.deepcopy(model), 2, 160) as found:
        return measured(bench, found.step)


def writing(bench: Bench, model: ByteModel) -> Found:
    """Of a written byte, one row."""
    decoder = open_decoder(copy.deepcopy(model).to(bench.device).eval(), rows=1, capacity=4 * WRITTEN + 64)
    row = np.zeros(1, np.int64)
    decoder.read(row.repeat(41), np.array([BOS, *(97 + np.arange(40) % 25)]))

    def write() -> None:
        byte = np.array([32])
        for _ in range(WRITTEN):
            byte = decoder.read(row, byte)[:, :256].argmax(1)

    return measured(bench, write, WRITTEN)


def measurements(bench: Bench) -> Iterator[Measurement]:
    for name, model in in_turn(tiny_models())[: bench.size(None, 3)]:
        yield f"step: {name}", partial(training, bench, model)
        yield f"byte: {name}", partial(writing, bench, model)
