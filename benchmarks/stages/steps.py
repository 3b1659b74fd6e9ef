"""Our training steps: bytes per second, launches, synchronisations, memory, and the share of matmul throughput.

One step is `bytelm.training.loop.Trainer.step` on rows of random bytes, recorded patches of 5 bytes, bfloat16 matmuls.
tflop_per_s, share: by the FLOPs that the model needs (see `train.py`), relative to a matmul of 8192 x 8192 x 8192.
memory: peak reserved memory by the prediction of `bytelm.training.memory.predict`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from generate import PATCH, SIZES, parameters
from train import Windows, needed

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, preset
from bytelm.interfaces.model import ByteModel
from bytelm.training.config import TrainConfig
from bytelm.training.journal import Journal
from bytelm.training.loop import Trainer
from bytelm.training.memory import predict
from stages.bench import Bench, Found, Measurement, peak, plain_torch, profiled, random_model, rates, seconds, waited

SECONDS, EACH = 150, 90
COLUMNS = (
    "rows",
    "window",
    "ms",
    "mb_per_s",
    "launches",
    "waits",
    "kernels_ms",
    "gib",
    "memory",
    "tflop_per_s",
    "share",
)


@dataclass(frozen=True)
class Shape:
    """A model's table, and the rows of how many bytes it learns from at a time."""

    model: dict[str, Any]
    rows: int
    window: int

    def recipe(self) -> Recipe:
        patching = {"patching": {"name": "fixed", "size": PATCH}} if self.model["name"] == "blt" else {}
        return build(Recipe, {"model": self.model, **patching}, "benchmark")

    def small(self) -> Shape:
        """For a rehearsal."""
        return Shape(SMALL[self.model["name"]], 2, 64)


def published(name: str, rows: int, window: int) -> Shape:
    return Shape(preset(name)["model"], rows, window)


def sized(name: str, rows: int, window: int) -> Shape:
    return Shape({"name": name, **SIZES["100M"][name]}, rows, window)


SHAPES = {
    "demo": published("demo", 8, 8192),
    "BLT 100M": sized("blt", 16, 8192),
    "MEGABYTE 100M": sized("megabyte", 16, 8192),
    "byte Transformer 127M": sized("transformer", 4, 8192),
    "blt-400m": published("blt-400m", 4, 8192),
    "linear-tiny": published("linear-tiny", 4, 2048),
    "blt-small": published("blt-small", 16, 8192),
    "megabyte-tiny": published("megabyte-tiny", 16, 8192),
    "byte-tiny": published("byte-tiny", 8, 4096),
    "byte-window-tiny": published("byte-window-tiny", 16, 8192),
    "perceiver-tiny": published("perceiver-tiny", 4, 4096),
}
VARIED = ("BLT 100M", "MEGABYTE 100M")  # also compiled, and without kernels of ours
SMALL: dict[str, dict[str, Any]] = {
    "blt": {"name": "blt", "local_dim": 32, "local_heads": 2, "cross_heads": 2, "decoder_layers": 1, "ngram_rows": 64}
    | {"global_dim": 64, "global_heads": 2, "global_layers": 1, "attention_window": 16},
    "megabyte": {"name": "megabyte", "sizes": [4], "dims": [32, 16], "layers": [1, 1], "heads": [2, 1]},
    "transformer": {"name": "transformer", "dim": 32, "layers": 1, "heads": 2},
    "linear": {"name": "linear", "dim": 32, "layers": 1, "heads": 2},
    "perceiver": {"name": "perceiver", "dim": 32, "layers": 1, "heads": 2, "latents": 16},
}


@contextlib.contextmanager
def trainer(bench: Bench, model: ByteModel, rows: int, window: int, compile: bool = False) -> Generator[Trainer]:
    """A training of a model that is moved to the device, as `bytelm train` has it, on windows of random bytes."""
    size: Any = {"context_length": window, "batch": rows}
    config = TrainConfig(steps=1 << 40, precision="bfloat16", spikes="keep", compile=compile, **size)
    windows = Windows(window, model.patcher is not None, rows)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        journal = Journal(Path(folder) / "metrics.jsonl", quiet=True)
        found = Trainer(model.to(bench.device).train(), config, windows, Path(folder), journal)
        if ahead := getattr(found, "ahead", None):  # the thread that draws the next step
            stack.enter_context(ahead)
        yield found


def step(bench: Bench, shape: Shape, compile: bool = False) -> Found:
    shape = bench.size(shape, shape.small())
    copy, product = rates(bench)
    model = random_model(bench, shape.recipe())
    with trainer(bench, model, shape.rows, shape.window, compile) as found:
        took = seconds(bench, found.step)
        about: Found = {"gib": peak(bench), **waited(bench, found.step), **profiled(bench, found.step)}
        expected = predict(model, found.config, PATCH).peak / 2**30
    operations = shape.rows * needed(model, shape.window)
    size = {"rows": shape.rows, "window": shape.window, "parameters": parameters(model)}
    return (
        size
        | {"ms": 1e3 * took, "mb_per_s": shape.rows * shape.window / took / 1e6, **about}
        | {
            "memory": about["gib"] and about["gib"] / expected,
            "predicted_gib": expected,
            "tflop_per_s": operations / took / 1e12,
            "share": operations / took / product,
            "copy_gb_per_s": copy / 1e9,
        }
    )


def plain(bench: Bench, shape: Shape) -> Found:
    with plain_torch():
        return step(bench, shape)


def measurements(bench: Bench) -> Iterator[Measurement]:
    for name, shape in bench.size(SHAPES, {shape.model["name"]: shape for shape in SHAPES.values()}).items():
        yield name, partial(step, bench, shape)
    for name in bench.size(VARIED, ()):
        yield f"{name}, plain torch", partial(plain, bench, SHAPES[name])
        yield f"{name}, compiled", partial(step, bench, SHAPES[name], compile=True)
