"""What a GPU makes of bytelm, stage by stage, beside peers in the same run; each figure is kept once it is there.

    python benchmarks/gpu.py                              all stages; figures are printed, and in runs/gpu/figures.jsonl
    python benchmarks/gpu.py steps write --seconds 500    some of them, so long at the most
    python benchmarks/gpu.py steps --only "blt 100M"      one of the parts of a stage
    python benchmarks/gpu.py --pretend                    every stage on the CPU in shapes of no size: a rehearsal

env        names and versions
ceilings   copying, products in bfloat16, a launch, a wait, copies from pinned and from pageable memory
laws       loss and gradients of every small model against the CPU in float64; the laws of models and of decoders
waits      where a step of training and a written byte wait for the device, by file and line
tables     tables of more than 2^31 numbers: read, learnt from, moved
kernels    each fused pass against float64, and its share of the speed of copying
steps      steps of training: ours, and those of transformers' BLT, MEGABYTE-pytorch and a plain byte Transformer
greedy     256 bytes of five prompts as the CPU writes them, in float32
write      bytes a second at 1, 8 and 32 rows: the headline pair, BLT-1B, the peers
compare    `bytelm compare` of BLT and BPE at one budget, on the corpora of --data

Every part of a stage is a process of its own: after a fault of the device no other work of a process succeeds. One that
fails by such a fault runs again with launches that wait, so that the error names its place. Times are medians of ten
after three, by events of the device; inputs are drawn anew; weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate import PATCH, SIZES, Shapes, recipe
from headline import GREEDY, PAIR, random_model
from numpy.typing import NDArray
from peers import Plain, megabyte_pytorch, plain_logits, transformers_blt
from torch import Tensor, nn
from torch.nn import functional as F

import bytelm
from bytelm.config import preset
from bytelm.data.sampler import Batch, Sampler
from bytelm.decoding import Decoder, open_decoder
from bytelm.generate.session import generate
from bytelm.models import blt
from bytelm.models.base import ByteModel
from bytelm.models.objective import score
from bytelm.patching import fixed, space
from bytelm.testing import DECODER_LAWS, MODEL_LAWS, tiny_models
from bytelm.train.config import TrainConfig
from bytelm.train.journal import Journal
from bytelm.train.loop import Trainer
from bytelm.units import BOS, PAD

Figures = dict[str, Any]
Part = Callable[["Bench"], Iterator[tuple[str, Figures]]]
WARM, TIMES = 3, 10
STRETCH = 48  # bytes in a row that are timed together
LIKE = {"transformers": "blt", "megabyte-pytorch": "megabyte", "plain": "transformer"}
FAULTS = ("CUDA error", "illegal memory access", "device-side assert")

SMALL: dict[str, dict[str, Any]] = {
    "blt": {"local_dim": 32, "local_heads": 2, "cross_heads": 2, "decoder_layers": 1, "encoder_layers": 1, "window": 16}
    | {"global_dim": 64, "global_heads": 2, "global_layers": 1, "ngram_rows": 101},
    "megabyte": {"sizes": [8], "dims": [64, 32], "layers": [1, 1], "heads": [2, 2]},
    "transformer": {"dim": 32, "layers": 1, "heads": 2},
}
"""What is pretended instead of the table's sizes."""


@dataclass
class Bench:
    """Where it is measured, and whether it is pretended: then on the CPU, with everything small."""

    pretend: bool
    data: list[str]
    budget: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.pretend else "cuda")

    def shapes(self, size: str) -> Shapes:
        return SMALL if self.pretend else SIZES[size]

    def wait(self) -> None:
        if not self.pretend:
            torch.cuda.synchronize()

    def timed(self, run: Callable[[], Any], times: int = TIMES, warm: int = WARM) -> float:
        """Seconds of a run: the median."""
        if self.pretend:
            times = warm = 1
        found: list[float] = []
        for index in range(warm + times):
            self.wait()
            began = time.perf_counter()
            if self.pretend:
                run()
                took = time.perf_counter() - began
            else:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                self.wait()
                took = first.elapsed_time(last) / 1e3
            found += [took] if index >= warm else []
        return statistics.median(found)

    def peak(self) -> float:
        """GiB that were held at the most since the last time."""
        if self.pretend:
            return 0.0
        found = torch.cuda.max_memory_reserved() / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return found

    def launches(self, run: Callable[[], Any]) -> Figures:
        """Kernels launched, times waited for the stream, and milliseconds of kernels, by the profiler."""
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (not self.pretend)
        with torch.profiler.profile(activities=kinds) as profile:
            run()
            self.wait()
        events = profile.key_averages()
        count = lambda *names: sum(e.count for e in events if e.key.startswith(names))  # noqa: E731
        busy = sum(e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA) / 1e3
        top = sorted((e for e in events if e.self_device_time_total), key=lambda e: -e.self_device_time_total)[:12]
        named = [[e.key[:60], round(e.self_device_time_total / 1e3, 2), e.count] for e in top if "::" not in e.key[:8]]
        launched = count("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
        return {"launches": launched, "stream waits": count("cudaStreamSynchronize"), "kernels ms": busy, "top": named}

    def waits(self, run: Callable[[], Any]) -> Figures:
        """Where the host waits for the device."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if not self.pretend:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                if not self.pretend:
                    torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchron" in str(w.message))
        return {"waits": sum(places.values()), "where": places.most_common(25)}


# --- models and steps -------------------------------------------------------------------------------------------------


class Windows(Sampler):
    """Random bytes in the place of a sampler: BOS, then one sequence a row, patches of 5 bytes recorded."""

    def __init__(self, rows: int, sequence: int, patched: bool) -> None:
        self.rows, self.sequence, self.patched = rows, sequence, patched

    def batch(self, step: int) -> Batch:
        shape = (self.rows, self.sequence + 1)
        ids = torch.randint(32, 127, shape, generator=torch.Generator().manual_seed(step))
        ids[:, 0] = BOS
        boundaries = (torch.arange(self.sequence + 1) % PATCH == 0).repeat(self.rows, 1)
        return Batch(ids.numpy(), boundaries.numpy() if self.patched else None)


def assembled(bench: Bench, name: str) -> ByteModel:
    """A model of ours by a name of the table of steps: "blt 100M", "preset blt-400m"."""
    kind, size = name.split()
    if kind == "preset":
        tables = preset(size)["model"]
        if tables["name"] == "blt":
            fields = {key: tuple(x) if isinstance(x, list) else x for key, x in tables.items() if key != "name"}
            return blt.Config(**fields).build(fixed.Config(size=PATCH).build())
        return random_model(tables).float()
    return recipe(bench.shapes(size), kind).assemble()


def own_step(bench: Bench, model: ByteModel, rows: int, sequence: int) -> Callable[[], None]:
    folder = Path(tempfile.mkdtemp())
    config = TrainConfig(steps=1 << 40, window=sequence, batch=rows, precision="bfloat16")
    windows = Windows(rows, sequence, hasattr(model, "patcher"))
    model.requires_grad_(True).initialise(0)
    if hasattr(model, "patcher"):
        model.patcher.requires_grad_(False)
    journal = Journal(folder / "metrics.jsonl", quiet=True)
    return Trainer(model.to(bench.device).train(), config, windows, folder, journal).step


def peer_step(
    bench: Bench, net: nn.Module, logits: Callable[[Tensor], Tensor], rows: int, sequence: int
) -> Callable[[], None]:
    net.to(bench.device).train()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    windows, count = Windows(rows, sequence, False), iter(range(1 << 40))

    def step() -> None:
        ids = torch.from_numpy(windows.batch(next(count)).ids).to(bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16):
            found = logits(ids[:, :-1])
        F.cross_entropy(found.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer(bench: Bench, system: str, size: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A peer at the shape of ours, and its logits of some ids. Raises ImportError."""
    shape = recipe(bench.shapes(size), LIKE[system]).model
    if system == "plain":
        net: Any = Plain(shape.dim, shape.layers, shape.heads, 1 << 14)
        return net, lambda ids: plain_logits(net, ids)
    net, _ = transformers_blt(shape, PATCH) if system == "transformers" else megabyte_pytorch(shape)
    if system == "megabyte-pytorch":
        return net, net

    def logits(ids: Tensor) -> Tensor:
        bounds = torch.tensor([0, *range(1, ids.shape[1] + 1, PATCH), ids.shape[1] + 1])
        lengths = bounds.diff().to(ids.device).expand(len(ids), -1)
        return net(input_ids=ids, patch_lengths=lengths, use_cache=False).logits

    return net, logits


# --- stages: parts by name, each of which gives (what, figures) as they come ------------------------------------------


def env(bench: Bench) -> Iterator[tuple[str, Figures]]:
    found: Figures = {"torch": torch.__version__, "python": platform.python_version(), "bytelm": bytelm.__version__}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if not bench.pretend:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
        found |= {
            "device": driver,
            "GiB": memory,
            "capability": torch.cuda.get_device_capability(),
            "cores": os.cpu_count(),
        }
    yield "machine", found


def ceilings(bench: Bench) -> Iterator[tuple[str, Figures]]:
    device, small = bench.device, bench.pretend
    full = torch.empty(1 << (16 if small else 32), dtype=torch.uint8, device=device).random_()
    other = torch.empty_like(full)
    yield "copy", {"TB/s": 2 * full.nbytes / bench.timed(lambda: other.copy_(full)) / 1e12}
    other.resize_(0)
    full.resize_(0)
    for shape in ((64, 64, 64),) if small else ((8192, 8192, 8192), (131072, 512, 1536), (131072, 512, 1408)):
        x, y = (torch.randn(n, k, device=device, dtype=torch.bfloat16) for n, k in ((shape[0], shape[1]), shape[1:]))
        rate = 2 * np.prod(shape, dtype=float) / bench.timed(lambda x=x, y=y: x @ y) / 1e12
        yield f"products {'x'.join(map(str, shape))}", {"TFLOP/s": rate}
    tiny, count = torch.zeros(8, device=device), 20 if small else 2000
    began = time.perf_counter()
    for _ in range(count):
        tiny.add_(1)
    yield "launch", {"us of the host": (time.perf_counter() - began) / count * 1e6}
    yield "wait", {"us": bench.timed(lambda: [tiny.add_(1).sum().item() for _ in range(10)]) / 10 * 1e6}
    host = torch.empty(1 << (16 if small else 26), dtype=torch.uint8)
    yield "upload, pageable", {"GB/s": host.nbytes / bench.timed(lambda: host.to(device, copy=True)) / 1e9}
    if not small:
        pinned = host.pin_memory()
        yield (
            "upload, pinned",
            {"GB/s": host.nbytes / bench.timed(lambda: pinned.to(device, copy=True, non_blocking=True)) / 1e9},
        )


def slopes(model: nn.Module) -> Tensor:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.to_dense() if g.is_sparse else g).flatten().cpu().double() for g in found])


def laws(bench: Bench) -> Iterator[tuple[str, Figures]]:
    for name, model in tiny_models():
        one = copy.deepcopy(model).double()
        if hasattr(one, "patcher"):
            one.patcher.float()
        ids = torch.randint(0, 256, (3, 60), generator=torch.Generator().manual_seed(0))
        ids[:, 0] = ids[1, 30] = BOS
        ids[2, 50:] = PAD
        marks = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.2
        other = copy.deepcopy(one).to(bench.device)
        losses = [score(m, ids, boundaries=marks)[0] for m in (one, other)]
        for loss in losses:
            loss.backward()
        gap = slopes(other) - slopes(one)
        apart = abs(float(losses[1].detach()) / float(losses[0].detach()) - 1)
        yield f"as the CPU: {name}", {"loss": apart, "slopes": float(gap.norm() / slopes(one).norm())}
    seen: set[str] = set()
    for name, model in tiny_models():
        kind = name.split(" on ")[0]
        if kind in seen or (bench.pretend and seen):
            continue
        seen.add(kind)
        placed, worst, broken = copy.deepcopy(model).to(bench.device), dict[str, float](), dict[str, str]()
        for law, check in (*MODEL_LAWS.items(), *DECODER_LAWS.items()):
            if law in ("cost", "initialise", "elsewhere"):
                continue
            try:
                worst[law] = check(placed, 0, 1 if bench.pretend else 2)
            except Exception as error:
                broken[law] = f"{type(error).__name__}: {error}"[:300]
        yield f"laws: {name}", {"worst": max(worst.values(), default=0.0), "kept": len(worst), "broken": broken}


def waits(bench: Bench) -> Iterator[tuple[str, Figures]]:
    for kind in ("blt", "megabyte", "transformer", "transformer-window"):
        model = recipe(bench.shapes("10M"), kind).assemble()
        step = own_step(bench, model, 2, 64 if bench.pretend else 2048)
        for _ in range(1 if bench.pretend else 3):
            step()
        yield f"step {kind}", bench.waits(step) | bench.launches(step)
        model = recipe(bench.shapes("10M"), kind).assemble().to(bench.device).eval().requires_grad_(False)
        decoder = open_decoder(model, rows=1, capacity=256)
        rows = np.zeros(1, np.int64)
        decoder.read(rows, np.array([BOS]))
        for byte in b"the first bytes":
            decoder.read(rows, np.array([byte]))
        written = bench.waits(
            lambda d=decoder, r=rows: [d.read(r, np.array([byte])) for byte in b"twenty bytes of text"]
        )
        written |= bench.launches(
            lambda d=decoder, r=rows: [d.read(r, np.array([byte])) for byte in b"twenty bytes of text"]
        )
        yield f"20 bytes {kind}", written | {"decoder": type(decoder).__name__}


def tables(bench: Bench) -> Iterator[tuple[str, Figures]]:
    rows = 1000 if bench.pretend else 500002
    config = blt.Config(
        local_dim=768, local_heads=12, cross_heads=12, decoder_layers=1, global_layers=1, ngram_rows=rows
    )
    if bench.pretend:
        config = blt.Config.tiny()["last layer crossed"]
    model = config.build(fixed.Config(size=PATCH).build())
    size = model.encoder.embed.ngram.weight.numel()
    step = own_step(bench, model, 2, 64 if bench.pretend else 8192)
    bench.peak()
    took = bench.timed(step)
    yield "table in training", {"numbers": size, "ms": took * 1e3, "peak GiB": bench.peak()}


def kernels(bench: Bench) -> Iterator[tuple[str, Figures]]:
    try:
        from bytelm.nn import device_kernels  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        yield "kernels", {"left out": str(error)}
        return
    for name, case in device_kernels.KERNELS.items():
        yield name, case(bench)


STEPS = {
    "blt 10M": (8, 8192),
    "blt 100M": (16, 8192),
    "preset blt-400m": (4, 8192),
    "megabyte 100M": (16, 8192),
    "transformer 100M": (4, 8192),
    "transformer-window 10M": (16, 8192),
    "preset linear-tiny": (4, 8192),
    "peer transformers 10M": (8, 8192),
    "peer transformers 100M": (4, 8192),
    "peer megabyte-pytorch 100M": (16, 8192),
    "peer plain 100M": (4, 8192),
}


def steps(name: str) -> Part:
    def measure(bench: Bench) -> Iterator[tuple[str, Figures]]:
        rows, sequence = (2, 64) if bench.pretend else STEPS[name]
        shown = name.replace("100M", "10M").replace("blt-400m", "blt-tiny") if bench.pretend else name
        operations: float | None = None
        while True:
            try:
                if shown.startswith("peer"):
                    _, system, size = shown.split()
                    net, logits = peer(bench, system, size)
                    step = peer_step(bench, net, logits, rows, sequence)
                    model = recipe(bench.shapes(size), LIKE[system]).assemble()
                else:
                    model = net = assembled(bench, shown)
                    step = own_step(bench, model, rows, sequence)
                operations = 3 * rows * model.flops(sequence, -(-sequence // PATCH))
                bench.peak()
                took = bench.timed(step)
                break
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
                step = net = None
                bench.peak()
        found = {"rows": rows, "sequence": sequence, "parameters": sum(p.numel() for p in net.parameters())}
        found |= {"ms": took * 1e3, "MB/s": rows * sequence / took / 1e6, "TFLOP/s": operations / took / 1e12}
        found |= {"peak GiB": bench.peak()} | bench.launches(step)
        yield name, found

    return measure


PROMPTS = (b"The ", b"def main(", b"\\section{", b"In the beginning", b"\xff\x00\x01")


def agree(one: bytes, other: bytes) -> int:
    """Bytes until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def greedy(bench: Bench) -> Iterator[tuple[str, Figures]]:
    count = 16 if bench.pretend else 256
    for kind in ("transformer", "blt", "megabyte"):
        model = recipe(bench.shapes("10M"), kind).assemble()
        model.initialise(0)
        model.eval().requires_grad_(False)
        there = copy.deepcopy(model).to(bench.device)
        how: dict[str, Any] = {"max_bytes": count, "sampling": GREEDY, "eos": False}
        wanted, found = ([x.data for x in generate(one, list(PROMPTS), **how)] for one in (model, there))
        same = [agree(*pair) for pair in zip(wanted, found, strict=True)]
        yield kind, {"bytes that agree, of each prompt": same, "of": count}


def random_blt(small: bool) -> ByteModel:
    """BLT-1B on space patches, in bfloat16 from the start."""
    tables = dict(preset("blt-1b")["model"])
    tables.pop("name")
    config = blt.Config.tiny()["last layer crossed"] if small else blt.Config(**tables)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta" if not small else "cpu"):
            model = config.build(space.Config().build())
        model = model if small else model.to_empty(device="cuda")
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def filled(decoder: Decoder, rows: NDArray[np.int64], context: int) -> None:
    """Have rows read random bytes until they have read so many ids."""
    while (length := int(decoder.lengths[0])) < context:
        some = min(decoder.chunk, context - length)
        ids = np.random.default_rng(length).integers(97, 122, some) if length else np.full(some := 1, BOS)
        for row in rows:
            decoder.read(np.repeat(row, some), ids)


def written(decoder: Decoder, rows: NDArray[np.int64], context: int) -> None:
    """A byte in each row after another, and back to where they were."""
    for step in range(STRETCH):
        decoder.read(rows, np.full(len(rows), 97 + step % 25))
    decoder.undo(rows, np.full(len(rows), context))


def write(name: str) -> Part:
    def measure(bench: Bench) -> Iterator[tuple[str, Figures]]:
        if name == "blt-1b":
            model = random_blt(bench.pretend)
        else:
            tables = {"name": "transformer", "layers": 1, "dim": 16, "heads": 2} if bench.pretend else PAIR[name]
            model = random_model(tables).to(bench.device)
        for rows in (1, 2) if bench.pretend else (1, 8, 32):
            decoder = open_decoder(model, rows=rows, capacity=256 if bench.pretend else 8192)
            every = np.arange(rows)
            for context in (1, 96) if bench.pretend else (1, 1024, 8000):
                filled(decoder, every, context)
                took = bench.timed(lambda d=decoder, e=every, c=context: written(d, e, c), 3, 1) / STRETCH
                figures = {"rows": rows, "context": context, "ms": took * 1e3, "bytes/s": rows / took}
                figures |= {"MB read": decoder.traffic(context) / 1e6, "decoder": type(decoder).__name__}
                yield f"{name}, {rows} rows, context {context}", figures
            del decoder
            bench.peak()

    return measure


def compare(bench: Bench) -> Iterator[tuple[str, Figures]]:
    home = Path(tempfile.mkdtemp()) / "compared"
    budget = 1.3e11 if bench.pretend else bench.budget
    models = "space,bpe:300" if bench.pretend else "blt,bpe:4096"
    command = [sys.executable, "-m", "bytelm", "compare", *bench.data, "--run", str(home), "--models", models]
    found = subprocess.run([*command, "--budget", str(budget), "--quiet"], capture_output=True, text=True, check=False)
    results = home / "results.json"
    if found.returncode or not results.exists():
        raise RuntimeError(found.stderr.strip()[-500:] or f"compare ended with {found.returncode}")
    yield f"budget {budget:.0e}", json.loads(results.read_bytes())


STAGES: dict[str, tuple[int, dict[str, Part]]] = {
    "env": (30, {"": env}),
    "ceilings": (60, {"": ceilings}),
    "laws": (150, {"": laws}),
    "waits": (90, {"": waits}),
    "tables": (90, {"": tables}),
    "kernels": (60, {"": kernels}),
    "steps": (75, {name: steps(name) for name in STEPS}),
    "greedy": (120, {"": greedy}),
    "write": (90, {name: write(name) for name in (*PAIR, "blt-1b")}),
    "compare": (540, {"": compare}),
}
"""Seconds that a part may take, and the parts."""


# --- the processes ----------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> int:
    """In the process of one part: print each figure as a line of JSON."""
    bench = Bench(options.pretend, options.data, options.budget)
    if not bench.pretend:
        torch.cuda.set_device(0)
    try:
        for what, figures in STAGES[options.stages[0]][1][options.part](bench):
            print(json.dumps({"what": what, **figures}, default=str), flush=True)
    except ImportError as error:
        print(json.dumps({"what": options.part, "left out": f"{error}"}), flush=True)
    except Exception as error:
        ours = [
            f for f in traceback.extract_tb(error.__traceback__) if "bytelm" in f.filename or "gpu.py" in f.filename
        ]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        print(
            json.dumps({"what": options.part, "failed": f"{type(error).__name__}: {error}"[:600], "at": place}),
            flush=True,
        )
        return 1
    return 0


def run_part(options: argparse.Namespace, stage: str, part: str, seconds: float, **env: str) -> list[Figures]:
    """One part in a process of its own; what it printed until it ended, or was ended."""
    more = ["--pretend"] * options.pretend + ["--budget", str(options.budget), "--data", *options.data]
    command = [sys.executable, __file__, stage, "--part", part, *more]
    found: list[Figures] = []
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, text=True, env={**os.environ, **env})
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            found.append({"what": part, "failed": f"stopped after {seconds:.0f} s"})
        said.seek(0)
        found = [json.loads(line) for line in said if line.startswith("{")] + found
        if process.returncode not in (0, 1, -9):
            errors.seek(0)
            found.append({"what": part, "failed": f"ended with {process.returncode}: {errors.read()[-300:]}"})
    return [{"stage": stage, "seconds": round(time.monotonic() - began, 1), **line} for line in found]


def shown(figure: Figures) -> str:
    """One line of the table."""
    left = {k: v for k, v in figure.items() if k not in ("stage", "what", "seconds", "where", "top")}
    text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in left.items())
    return f"{figure['stage']:<9} {figure['what']:<44} {text}"[:400]


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=(*STAGES, []), help="all unless given")
    parser.add_argument("--only", action="append", help="parts of stages, by name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument(
        "--data", nargs="*", default=[], help="what `compare` is given; without it the stage is left out"
    )
    parser.add_argument("--budget", type=float, default=1e16, help="FLOPs of each model that is compared")
    parser.add_argument("--pretend", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part is not None:
        return work(options)
    if not (options.pretend or torch.cuda.is_available()):
        print("gpu.py: no CUDA device here: --pretend rehearses on the CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + options.seconds, 0
    with (options.out / "figures.jsonl").open("a", encoding="utf-8") as kept:
        for stage in options.stages or STAGES:
            limit, parts = STAGES[stage]
            for part in parts:
                left = end - time.monotonic()
                left_out = options.only and part not in options.only
                if left_out or (stage == "compare" and not options.data) or left < 1:
                    continue
                found = run_part(options, stage, part, min(limit, left))
                if any(fault in str(line.get("failed")) for line in found for fault in FAULTS):
                    again = run_part(options, stage, part, min(limit, end - time.monotonic()), CUDA_LAUNCH_BLOCKING="1")
                    found += [{**line, "what": f"{line['what']}, launches waited for"} for line in again]
                for line in found:
                    failed += "failed" in line
                    kept.write(json.dumps(line) + "\n")
                    print(shown(line), flush=True)
                kept.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
