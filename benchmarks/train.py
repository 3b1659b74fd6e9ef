"""Training throughput of ours and peers in the same run: bytes per second, share of matmul throughput, memory.

    python benchmarks/train.py                                    about 10M and 30M parameters, 4 KiB and 16 KiB
    python benchmarks/train.py --json --svg docs/train.svg
    python benchmarks/train.py --only 10M:4096 --models blt --peers none
    python benchmarks/train.py --only 10M:4096 --profile          the time of our step by operator kind
    python benchmarks/train.py --precision float32                where there are no products in bfloat16

One step is one sequence of random bytes: forward, backward, clipping, AdamW; float32 weights, matmuls in --precision.
Every system has a separate process, for its peak memory. Systems alternate, every other round in reverse; medians over
rounds. Shapes and parameter counts are those of `generate.py`.

bytelm            the step of `bytelm train` itself, `bytelm.training.loop.Trainer.step`; BLT with recorded boundaries
                  every 5 bytes
plain             a byte Transformer as in nanoGPT, full attention by torch's fused kernel
transformers      BltForCausalLM at our BLT's shape, with given patches
megabyte-pytorch  MEGABYTE at our widths, layers and patches (see generate.py)

matmul_share: the FLOPs that the model needs (3 × forward, without masked pairs of attention), by the time of the step,
by this machine's throughput on the matmuls of our model's linear layers in that precision, forward and backward,
weighted by shape, by the faster library. A peer's FLOPs are those of our model. peak_gib: peak resident memory, minus
that before the model was built.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from generate import PATCH, SIZES, Shapes, label, recipe
from peers import Plain, megabyte_pytorch, parameters, plain_logits, transformers_blt
from pictures import MARGIN, page
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.data.files import write_whole
from bytelm.data.sampler import Batch, Sampler
from bytelm.interfaces.model import ByteModel
from bytelm.nn import transformer
from bytelm.nn.products import product
from bytelm.report.charts import Bar, bar_chart
from bytelm.training.config import TrainConfig
from bytelm.training.journal import Journal
from bytelm.training.loop import Trainer
from bytelm.units import BOS

GROUPS = (("10M", 4096), ("30M", 4096), ("10M", 16384))
MODELS = ("blt", "megabyte", "transformer", "transformer-window")
PEERS = ("transformers", "megabyte-pytorch", "plain")
SHORT = 4096
AT_ONE_LENGTH = ("transformer", "transformer-window")  # of ours, measured at the shortest length only
KEYS = ("system", "model", "size", "sequence", "bytes_per_s", "matmul_share", "peak_gib")
LIKE = {"transformers": "blt", "megabyte-pytorch": "megabyte", "plain": "transformer"}

# --- in the process of one system -------------------------------------------------------------------------------------


class Windows(Sampler):
    """A sampler of random bytes: BOS, then a sequence per row, with recorded patches of 5 bytes."""

    def __init__(self, sequence: int, patched: bool, rows: int = 1) -> None:
        self.sequence, self.patched, self.rows = sequence, patched, rows

    def batch(self, step: int) -> Batch:
        ids = torch.randint(32, 127, (self.rows, self.sequence + 1), generator=torch.Generator().manual_seed(step))
        ids[:, 0] = BOS
        boundaries = torch.arange(self.sequence + 1).expand(self.rows, -1) % PATCH == 0
        return Batch(ids.numpy(), boundaries.numpy() if self.patched else None)

    def epoch_of(self, step: int) -> int:
        return 0


def own_step(model: ByteModel, sequence: int, folder: Path, precision: str) -> Callable[[], None]:
    config = TrainConfig(steps=1 << 40, context_length=sequence, batch=1, precision=precision)
    windows = Windows(sequence, hasattr(model, "patcher"))
    return Trainer(model.train(), config, windows, folder, Journal(folder / "metrics.jsonl", quiet=True)).step


def peer(system: str, model: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A peer at our shape, and its logits function."""
    if system == "plain":
        net = Plain(model.dim, model.layers, model.heads, 1 << 15)
        return net, lambda ids: plain_logits(net, ids)
    net, _ = transformers_blt(model, PATCH) if system == "transformers" else megabyte_pytorch(model)
    if system == "megabyte-pytorch":
        return net, net

    def logits(ids: Tensor) -> Tensor:
        count = ids.shape[1]
        lengths = torch.tensor([0, *range(1, count + 1, PATCH), count + 1]).diff()  # of one more than there are
        lengths = lengths.expand(len(ids), -1).to(ids.device)
        return net(input_ids=ids, patch_lengths=lengths, use_cache=False).logits

    return net, logits


def peer_step(
    net: nn.Module, logits: Callable[[Tensor], Tensor], sequence: int, rows: int = 1, precision: str = "bfloat16"
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.train().parameters(), fused=True)
    windows, count = Windows(sequence, False, rows), iter(range(1 << 40))
    device = next(net.parameters()).device

    def step() -> None:
        ids = torch.from_numpy(windows.batch(next(count)).ids).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found = logits(ids[:, :-1])
        F.cross_entropy(found.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def resident(key: str) -> int:
    """Memory of this process: VmRSS (present) or VmHWM (peak); 0 if unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def needed(model: ByteModel, sequence: int) -> float:
    """FLOPs that a step needs; `ByteModel.flops` also counts masked pairs."""

    def seen(new: int, window: int | None) -> int:
        width = min(new, window or new)
        return new * width - width * (width - 1) // 2

    executed, transformer.pairs = transformer.pairs, seen
    try:
        return 3.0 * model.flops(sequence, -(-sequence // PATCH))
    finally:
        transformer.pairs = executed


def matmul_rate(model: ByteModel, sequence: int, kind: torch.dtype) -> float:
    """FLOP/s of the matmuls of the model's linear layers, forward and backward."""
    shapes: Counter[tuple[int, int, int]] = Counter()

    def note(layer: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
        shapes[given[0].numel() // given[0].shape[-1], *reversed(layer.weight.shape)] += 1

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    batch = Windows(sequence, hasattr(model, "patcher")).batch(0)
    with torch.no_grad():
        model(
            torch.from_numpy(batch.ids[:, :-1]),
            None,
            None if batch.boundaries is None else torch.from_numpy(batch.boundaries[:, :-1]),
        )
    for hook in hooks:
        hook.remove()
    operations = seconds = 0.0
    for (rows, given, found), count in shapes.items():
        x, slope, weight = (torch.randn(shape).to(kind) for shape in ((rows, given), (rows, found), (found, given)))
        for left, right in ((x, weight.t()), (slope, weight), (slope.t(), x)):
            best = float("inf")
            for _ in range(8):
                began = time.perf_counter()
                product(left, right.t())
                best = min(best, time.perf_counter() - began)
            operations, seconds = operations + count * 2.0 * rows * given * found, seconds + count * best
    return operations / seconds


KINDS = {
    "matrix products of layers": ("aten::mm", "aten::addmm", "mkldnn::_linear"),
    "attention": ("_Attention", "aten::bmm", "aten::_scaled_dot", "aten::_softmax", "aten::baddbmm", "aten::_flash"),
    "attention of bytes and patches": ("_Cross",),
    "norms, gates, rotations": ("_Norm", "_SwiGLU", "_Rotate"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::clone", "aten::index", "aten::gather"),
    "optimizer": ("aten::_fused_adamw", "Optimizer", "aten::_coalesce", "aten::linalg_vector_norm"),
    "tables": ("aten::embedding", "aten::_embedding_bag"),
}


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Shares of a step's time by operator kind (self time)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step()
    events = [(event.key, event.self_cpu_time_total) for event in seen.key_averages()]
    whole = sum(own for _, own in events)
    shares: Counter[str] = Counter()
    for key, own in events:
        kind = next((kind for kind, keys in KINDS.items() if key.startswith(keys)), "everything else")
        shares[kind] += own / whole
    return dict(shares.most_common())


def work(task: dict[str, Any]) -> None:
    """Execute commands from stdin: step, profile, matmul rate, and finally memory."""
    torch.manual_seed(0)
    model = recipe(task["shapes"], task["model"]).build()
    own = task["system"] == "bytelm"
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        if own:
            model.init_weights(0)
            net, step = model, own_step(model, task["sequence"], Path(folder), task["precision"])
        else:
            net, logits = peer(task["system"], model.config)
            step = peer_step(net, logits, task["sequence"], precision=task["precision"])
        answer({"parameters": parameters(net), "needed": needed(model, task["sequence"])})
        for word in map(str.strip, sys.stdin):
            if word == "step":
                began = time.perf_counter()
                step()
                answer({"seconds": time.perf_counter() - began})
            elif word == "profile":
                answer(profiled(step))
            elif word == "rate":
                answer({"rate": matmul_rate(model, task["sequence"], getattr(torch, task["precision"]))})
            else:
                answer({"peak": max(0, resident("VmHWM") - before)})


def answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


# --- in the process that measures -------------------------------------------------------------------------------------


@dataclass
class Worker:
    """The process of one system."""

    system: str
    model: str
    process: subprocess.Popen[str]
    about: dict[str, Any]
    seconds: list[float] = field(default_factory=list)

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def started(system: str, model: str, shapes: Shapes, sequence: int, precision: str) -> Worker | None:
    """Start a system's process; None, with a message, if a dependency is not installed."""
    about = {"system": system, "model": model, "shapes": shapes, "sequence": sequence, "precision": precision}
    task = json.dumps(about)
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--work", task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
        )
        assert process.stdout is not None
        while line := process.stdout.readline():
            if line.startswith("{"):  # some libraries have something to say first
                return Worker(system, model, process, json.loads(line))
        process.communicate()
        told.seek(0)
        why = told.read().strip().splitlines()[-1]
    print(f'skipping {system} / {model} ({why}): pip install -e ".[bench]" adds it', file=sys.stderr)
    return None


def group(shapes: Shapes, size: str, sequence: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of systems that alternate."""
    own = [model for model in options.models if sequence <= SHORT or model not in AT_ONE_LENGTH]
    wanted = [("bytelm", model) for model in own]
    wanted += [(system, LIKE[system]) for system in PEERS if system in options.peers]
    found = (started(system, model, shapes, sequence, options.precision) for system, model in wanted)
    workers = [worker for worker in found if worker is not None]
    rates: dict[str, float] = {}
    for worker in workers:
        worker.ask("step")  # the first is not counted
        if worker.system == "bytelm" and options.profile:
            worker.about["profile"] = worker.ask("profile")
    for turn in range(options.rounds):
        for worker in workers if turn % 2 == 0 else reversed(workers):
            worker.seconds.append(worker.ask("step")["seconds"])
    for worker in workers:
        if worker.model not in rates:
            rates[worker.model] = worker.ask("rate")["rate"]
    for worker in workers:
        seconds = statistics.median(worker.seconds)
        yield {
            "system": worker.system,
            "model": worker.model,
            "size": size,
            "sequence": sequence,
            "bytes_per_s": sequence / seconds,
            "gflop_per_s": worker.about["needed"] / seconds / 1e9,
            "matmul_share": worker.about["needed"] / seconds / rates[worker.model],
            "peak_gib": worker.ask("end")["peak"] / 2**30,
            "parameters": worker.about["parameters"],
        } | ({"profile": worker.about["profile"]} if "profile" in worker.about else {})
        worker.process.communicate()  # closes its stdin, so that it ends


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'':<30}{'size':>5}{'bytes':>7}{'M param':>9}{'kB/s':>8}{'GFLOP/s':>9}{'of matmul':>10}{'peak GiB':>9}")
    for row in rows:
        print(
            f"{row['system'] + ' / ' + row['model']:<30}{row['size']:>5}{row['sequence']:>7}"
            f"{row['parameters'] / 1e6:>9.2f}{row['bytes_per_s'] / 1e3:>8.2f}{row['gflop_per_s']:>9.0f}"
            f"{row['matmul_share']:>10.0%}{row['peak_gib']:>9.2f}"
        )


def ratios(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Speed-ups of ours over peers of the same size and sequence length."""
    speed = {(r["system"], r["model"], r["size"], r["sequence"]): r["bytes_per_s"] for r in rows}
    found: list[tuple[str, float]] = []
    for (system, model, size, sequence), fast in speed.items():
        for other in PEERS:
            slow = speed.get((other, LIKE[other], size, sequence))
            if system == "bytelm" and slow and (LIKE[other] == model or (other == "plain" and "former" not in model)):
                found.append((f"{model} / {other}, {size}, {sequence} bytes", fast / slow))
    return found


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Throughput, fastest first, one chart per group, as an SVG file."""
    charts: list[tuple[int, int, str]] = []
    for column, (size, sequence) in enumerate(dict.fromkeys((row["size"], row["sequence"]) for row in rows)):
        own = sorted(
            (r for r in rows if (r["size"], r["sequence"]) == (size, sequence)), key=lambda r: -r["bytes_per_s"]
        )
        bars = [
            Bar(
                label(row).replace("transformer-window", "windowed"),
                row["bytes_per_s"] / 1e3,
                ours=row["system"] == "bytelm",
            )
            for row in own
        ]
        title = f"kB per second in training, {size}, {sequence} bytes"
        charts.append((column, MARGIN, bar_chart(bars, "kB per second", title)))
    return page(charts)


def options_of(arguments: Sequence[str] | None, groups: Sequence[tuple[str, int]]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = [f"{size}:{sequence}" for size, sequence in groups]
    parser.add_argument("--only", choices=named, help="one group of systems alone")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--peers", type=lambda text: [] if text == "none" else text.split(","), default=list(PEERS))
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture")
    parser.add_argument("--profile", action="store_true", help="the time of our step by operator kind")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(MODELS) | set(options.peers) - set(PEERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if options.rounds < 1:
        parser.error("give rounds from 1 up")
    return options


def main(
    arguments: Sequence[str] | None = None,
    sizes: dict[str, Shapes] = SIZES,
    groups: Sequence[tuple[str, int]] = GROUPS,
) -> int:
    options = options_of(arguments, groups)
    if options.work:
        work(json.loads(options.work))
        return 0
    rows: list[dict[str, Any]] = []
    for size, sequence in groups:
        if options.only in (None, f"{size}:{sequence}"):
            rows += group(sizes[size], size, sequence, options)
            if not options.json:
                print(f"{size}, {sequence} bytes: done", file=sys.stderr)
    if options.svg is not None:
        write_whole(options.svg, picture(rows).encode())
    if options.json:
        print(json.dumps({"rows": [{key: row[key] for key in (*KEYS, "profile") if key in row} for row in rows]}))
        return 0
    show(rows)
    for name, ratio in ratios(rows):
        print(f"{name}: {ratio:.2f} times as fast")
    for row in rows:
        for kind, share in row.get("profile", {}).items():
            print(f"{row['model']}, {row['size']}, {row['sequence']} bytes: {share:>4.0%} {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
