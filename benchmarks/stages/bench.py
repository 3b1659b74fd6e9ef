"""Shared by stages: device, timing, launches, synchronisations, output. Without a GPU everything runs on the CPU."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from bytelm.checkpoint.assemble import Recipe
from bytelm.interfaces.model import ByteModel
from bytelm.nn import fused
from bytelm.nn.runs import Runs

T = TypeVar("T")
Found = dict[str, Any]
Measurement = tuple[str, Callable[[], Found]]

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # the first two also as ...ExC and ...Ex
SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize")
WARM, ROUNDS = 3, 10
RATES = ("copy", "gb_per_s"), ("product bf16 8192", "tflop_per_s")  # of the stage `ceilings`
DATA = Path("build/gpu/data")
TOP = 12  # kernels that a profile names


@dataclass(frozen=True)
class Bench:
    """Where to measure, and where results lie."""

    device: torch.device
    out: Path
    pretend: bool = False
    data: Path = DATA
    budget: float = 1e16
    left: float = 600.0
    """Seconds that the stage may take from when it began."""

    def size(self, real: T, small: T) -> T:
        """What is measured; in a rehearsal something small in its place."""
        return small if self.pretend else real

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until all that is queued is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def found(self, stage: str) -> dict[str, Found]:
        """What was measured so far in a stage, by name."""
        return {line["name"]: line for line in read(self.out, stage) if "begun" not in line}


def read(out: Path, stage: str) -> Iterator[Found]:
    """The lines of a stage's file."""
    path = out / f"{stage}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the end of a file whose writer was killed
            yield json.loads(line)


def write(out: Path, stage: str, line: Found) -> None:
    """One more line, in the file when this returns."""
    with (out / f"{stage}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def free() -> None:
    """Give back what the measurement before had taken, and begin to count memory anew."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(bench: Bench) -> float | None:
    """GiB that were reserved at the most since `free`."""
    return torch.cuda.max_memory_reserved(bench.device) / 2**30 if bench.cuda else None


def in_turn(named: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """The first of each kind (the name's first word), then the second of each: whatever time is left for."""
    seen: Counter[str] = Counter()
    places: list[tuple[int, tuple[str, T]]] = []
    for pair in named:
        kind = pair[0].split()[0]
        places.append((seen[kind], pair))
        seen[kind] += 1
    return [pair for _, pair in sorted(places, key=lambda place: place[0])]


@torch.no_grad()
def random_model(bench: Bench, recipe: Recipe, dtype: torch.dtype = torch.float32) -> ByteModel:
    """A model with random weights that lie where they are read, its patcher's in float32: nothing of it is learnt."""
    model = recipe.build_on_meta().to(dtype)
    if model.patcher is not None:
        model.patcher.float()
    model = model.to_empty(device=bench.device)
    for parameter in model.parameters():
        parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    return model


@contextlib.contextmanager
def plain_torch() -> Generator[None]:
    """Without kernels of ours on a GPU, and without attention by runs."""
    with mock.patch.object(fused, "kernels", lambda _: None), mock.patch.object(Runs, "fits", lambda *_: False):
        yield


# --- times ------------------------------------------------------------------------------------------------------------


def intervals(bench: Bench, step: Callable[[], object], warm: int = WARM, rounds: int = ROUNDS) -> list[float]:
    """Seconds between the ends of steps that are queued one after another: of a GPU's work, or the host's."""
    warm, rounds = bench.size((warm, rounds), (1, 2))
    for _ in range(warm):
        step()
    bench.wait()
    if not bench.cuda:
        marks = [time.perf_counter()]
        for _ in range(rounds):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    bench.wait()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def seconds(bench: Bench, step: Callable[[], object], warm: int = WARM, rounds: int = ROUNDS) -> float:
    """The median of them."""
    return statistics.median(intervals(bench, step, warm, rounds))


def copy_rate(bench: Bench) -> float:
    """Bytes a second that memory reads and writes: a copy of 8 GB, half of it read and half of it written."""
    half = bench.size(4_000_000_000, 1 << 20)
    source, target = (torch.zeros(half, dtype=torch.uint8, device=bench.device) for _ in range(2))
    return 2 * half / seconds(bench, lambda: target.copy_(source))


def product_rate(
    bench: Bench, rows: int = 8192, inner: int = 8192, columns: int = 8192, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Operations a second of a matrix product [rows, inner] x [inner, columns], random and dense."""
    rows, inner, columns = bench.size((rows, inner, columns), (64, 64, 64))
    left = torch.randn(rows, inner, device=bench.device).to(dtype)
    right = torch.randn(columns, inner, device=bench.device).to(dtype).t()  # as a linear layer holds its weight
    return 2 * rows * inner * columns / seconds(bench, lambda: left @ right)


def known_rates(bench: Bench) -> tuple[float, float] | None:
    """Bytes and bfloat16 operations a second, as `ceilings` found them."""
    found = bench.found("ceilings")
    copy, product = (found.get(name, {}).get(key) for name, key in RATES)
    return (copy * 1e9, product * 1e12) if copy and product else None


def rates(bench: Bench) -> tuple[float, float]:
    """The same, found now where they are not known."""
    return known_rates(bench) or (copy_rate(bench), product_rate(bench))


# --- launches and waits -----------------------------------------------------------------------------------------------


def profiled(bench: Bench, step: Callable[[], object]) -> Found:
    """Of one step: launches, waits of the stream, copies from and to pageable memory, and where the GPU's time went.

    `top` has milliseconds and calls of kernels; on a CPU, where there are none, of operators.
    """
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with torch.profiler.profile(activities=kinds) as seen:
        step()
        bench.wait()
    events = seen.key_averages()
    there = DeviceType.CUDA
    kernels = [e for e in events if e.device_type == there and not getattr(e, "is_user_annotation", False)]

    def calls(*names: str) -> int:
        return sum(e.count for e in events if e.device_type != there and e.key.startswith(names))

    own = [(e.key, e.self_device_time_total, e.count) for e in kernels]
    own = own or [(e.key, e.self_cpu_time_total, e.count) for e in events]
    own.sort(key=lambda kernel: -kernel[1])
    return {
        "launches": calls(*LAUNCHES) if bench.cuda else calls("aten::"),
        "syncs": calls(*SYNCS),
        "pageable": sum(e.count for e in kernels if "Memcpy" in e.key and "Pageable" in e.key),
        "kernels_ms": sum(e.self_device_time_total for e in kernels) / 1e3,
        "top": [[key[:90], round(took / 1e3, 4), count] for key, took, count in own[:TOP]],
    }


def place() -> str:
    """The innermost file and line of the package that is being run; of whoever calls torch if none is."""
    passed_over = __file__, warnings.__file__
    frames = [f for f in traceback.extract_stack() if f.filename not in passed_over and "/torch/" not in f.filename]
    ours = [f for f in frames if "/src/bytelm/" in f.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rpartition('/src/')[2]}:{frame.lineno}"


@contextlib.contextmanager
def waits(bench: Bench) -> Generator[Counter[str]]:
    """Where the host waits for the GPU while the block runs, by file and line of ours; torch.sparse is not seen."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            found[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")


def waited(bench: Bench, step: Callable[[], object]) -> Found:
    """The waits of one step."""
    with waits(bench) as found:
        step()
    return {"waits": sum(found.values()), "where": dict(found.most_common())}


# --- numbers ----------------------------------------------------------------------------------------------------------


def apart(found: Tensor, wanted: Tensor) -> float:
    """The distance of two tensors to the size of the second, in float64; infinite where something is not a number."""
    found, wanted = (x.detach().to_dense().cpu().double() for x in (found, wanted))
    gap = float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))
    return gap if gap == gap else float("inf")
