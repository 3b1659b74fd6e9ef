"""How fast models write, beside peers in the same run: bytes per second, time to the first byte, share of the floor.

    python benchmarks/generate.py                                       about 10M parameters, batch 1 and 8
    python benchmarks/generate.py --json --rounds 3
    python benchmarks/generate.py --size 30M --models blt,transformer --peers plain
    python benchmarks/generate.py --size 100M --models blt-bf16,blt-int8,megabyte-bf16,megabyte-int8 --peers none
    python benchmarks/generate.py --long                                prompts of 8 KiB and 64 KiB too
    python benchmarks/generate.py --curve                               ms per byte of ours after 256 bytes to 64 KiB
    python benchmarks/generate.py --profile --models blt --batches 1    where a step's time goes, and a forward pass's

Systems alternate within a round, every other round in reverse; medians over rounds. Weights and prompts are random,
generation is greedy, in float32 (except for models named "-bf16" or "-int8"), with torch's default threads. Parameters
exclude tables of n-grams and positions. Prompts of a batch have equal length, so that patches of its rows coincide.

bytelm            by `bytelm.generate.prompts.pieces`; BLT with fixed patches of 5 bytes ("blt-entropy": the same
                  patches, but an n-gram entropy model runs on every byte)
plain             a byte Transformer as in nanoGPT with a preallocated cache: the baseline for BLT and MEGABYTE
transformers      BltForCausalLM at our BLT's shape without a cache (with one its logits are wrong): each byte processes
                  the prefix again. Favoured: fixed patch lengths instead of its patcher, logits of the last position
                  only, no `generate` around it
megabyte-pytorch  MEGABYTE at our widths, layers and patches, which also processes the prefix again for each byte.
                  Driven as in its `generate`, but greedily, with `flash_attn` and without rotary positions, its fastest
                  setting. Its stages share one number of heads: the one with parameters nearest to ours

bytes_per_s: all rows together, after the first byte. ms_first_byte: from the call until each row has one byte.
floor_share: fraction of the bandwidth roofline, the time to read a step's weights and caches, at the bandwidth of the
best of several reductions over a buffer of that size (a cache's bandwidth if the model fits), by the step's time.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peers import Plain, Writer, megabyte_pytorch, parameters, transformers_blt
from pictures import MARGIN, page
from torch import nn

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build
from bytelm.data.files import write_whole
from bytelm.decoding import Quantization, open_decoder
from bytelm.decoding.plain import PlainDecoder
from bytelm.generate.prompts import pieces
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import Request, Session
from bytelm.interfaces.model import ByteModel
from bytelm.report.charts import Bar, bar_chart

BYTES = 80  # after the first: a multiple of patches of 5, 8 and 4 x 4
PATCH, WINDOW = 5, 512
PROMPTS, LONG = (256, 2048), (8192, 65536)
CURVE = (256, 1024, 4096, 16384, 65536)
CURVES = ("blt", "megabyte", "transformer-window")
MODELS = ("blt", "megabyte", "megabyte-3", "transformer")
PEERS = ("plain", "transformers", "megabyte-pytorch")
# Limits of rows × prompt bytes: by memory, and for systems without a cache by time.
MOST = {"bytelm": 1 << 16, "plain": 1 << 16, "transformers": 1 << 13, "megabyte-pytorch": 1 << 16}
SHORT = 4096  # up to so many, systems without a cache generate 9 bytes, above 3
ROOF = 1 << 30  # bytes of the largest buffer that bandwidth is measured on

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "10M": {
        "blt": {"local_dim": 192, "local_heads": 3, "cross_heads": 3, "decoder_layers": 4}
        | {"global_dim": 384, "global_heads": 6, "global_layers": 4, "attention_window": WINDOW},
        "megabyte": {"sizes": [8], "dims": [384, 192], "layers": [5, 3], "heads": [6, 3]},
        "megabyte-3": {"sizes": [4, 4], "dims": [384, 256, 192], "layers": [4, 2, 3], "heads": [6, 4, 3]},
        "transformer": {"dim": 384, "layers": 6, "heads": 6},
    },
    "100M": {
        "blt": {"local_dim": 512, "local_heads": 8, "cross_heads": 8, "decoder_layers": 6}
        | {"global_dim": 1024, "global_heads": 16, "global_layers": 8, "attention_window": WINDOW},
        "megabyte": {"sizes": [8], "dims": [1280, 640], "layers": [6, 6], "heads": [20, 10]},
        "megabyte-3": {"sizes": [4, 4], "dims": [1280, 768, 640], "layers": [4, 4, 4], "heads": [20, 12, 10]},
        "transformer": {"dim": 1024, "layers": 10, "heads": 16},
    },
    "30M": {
        "blt": {"local_dim": 256, "local_heads": 4, "cross_heads": 4, "decoder_layers": 6}
        | {"global_dim": 512, "global_heads": 8, "global_layers": 7, "attention_window": WINDOW},
        "megabyte": {"sizes": [8], "dims": [512, 256], "layers": [8, 4], "heads": [8, 4]},
        "megabyte-3": {"sizes": [4, 4], "dims": [512, 384, 256], "layers": [6, 4, 3], "heads": [8, 6, 4]},
        "transformer": {"dim": 512, "layers": 9, "heads": 8},
    },
}

Shapes = dict[str, dict[str, Any]]


def random_prompts(rows: int, length: int) -> list[bytes]:
    ids = torch.randint(32, 127, (rows, length), generator=torch.Generator().manual_seed(length))
    return [bytes(row) for row in ids.tolist()]


# --- ours -------------------------------------------------------------------------------------------------------------


def recipe(shapes: Shapes, name: str) -> Recipe:
    """A model of ours; "blt-entropy" and "transformer-window" follow from the shapes of the table."""
    name = plain_name(name)[0]
    kind, _, variant = name.partition("-")
    model = {"name": kind, **shapes[name if name in shapes else kind]}
    mapping: dict[str, Any] = {"model": model}
    if kind == "blt":
        mapping["patching"] = {"name": "fixed", "size": PATCH}
    if variant == "entropy":  # the threshold is never exceeded: patches end by max_length
        mapping["patching"] = {"name": "entropy", "threshold": 100.0, "max_length": PATCH}
        mapping["entropy_model"] = {"name": "ngram"}
    if variant == "window":
        mapping["model"]["attention_window"] = WINDOW
    return build(Recipe, mapping, "benchmark")


def plain_name(name: str) -> tuple[str, Quantization | None]:
    """A model's name without its quantization, and the quantization."""
    for weights in ("bf16", "int8"):
        if name.endswith(f"-{weights}"):
            return name.removesuffix(f"-{weights}"), weights
    return name, None


def ours(model: ByteModel, quantize: Quantization | None) -> Writer:
    greedy = Sampling(temperature=0.0)

    def write(prompts: Sequence[bytes], count: int) -> Iterator[None]:
        have, steps = [0] * len(prompts), 0
        for piece in pieces(model, prompts, max_bytes=count, sampling=greedy, eos=False, quantize=quantize):
            have[piece.row] += len(piece.data)
            while steps < min(have):
                steps += 1
                yield

    return write


def traffic(contender: Contender, rows: int, length: int, capacity: int) -> float:
    """Bytes that one step of all rows reads after `length` ids each."""
    weights = plain_name(contender.model)[1]
    return open_decoder(contender.net, rows=rows, capacity=capacity, quantize=weights).traffic(length)


def bandwidth(size: int) -> float:
    """Read bandwidth over a buffer of so many bytes: the best of several reductions."""
    return read_rate(torch.ones(max(1024, min(size, ROOF) // 4)))


def read_rate(buffer: torch.Tensor, times: int = 4) -> float:
    """The same over a float32 buffer, each reduction as often."""
    best = float("inf")
    for read in (buffer.sum, buffer.amax, buffer.view(torch.int32).amax, lambda: torch.dot(buffer, buffer)):
        for _ in range(times):
            began = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    system: str
    model: str
    net: nn.Module
    write: Writer


def contenders(shapes: Shapes, models: Sequence[str], peers: Sequence[str], capacity: int) -> Iterator[Contender]:
    """Ours, then their peers; those not installed are reported and skipped."""
    torch.manual_seed(0)
    for name in models:
        model = recipe(shapes, name).build()
        model.init_weights(0)
        yield Contender("bytelm", name, model.eval(), ours(model, plain_name(name)[1]))
    if "plain" in peers:
        plain = Plain(**shapes["transformer"], capacity=capacity).eval()
        yield Contender("plain", "transformer", plain, plain.write)
    makers = {"transformers": lambda blt: transformers_blt(blt, PATCH), "megabyte-pytorch": megabyte_pytorch}
    for name in models:
        system = {"blt": "transformers", "megabyte": "megabyte-pytorch", "megabyte-3": "megabyte-pytorch"}.get(name)
        if system in peers:
            try:
                yield Contender(system, name, *makers[system](recipe(shapes, name).model))
            except ImportError as error:
                print(f'skipping {system} / {name} ({error}): pip install -e ".[bench]" adds it', file=sys.stderr)


@dataclass
class Cell:
    """One contender at one prompt length, and its measurements so far."""

    contender: Contender
    batch: int
    prompt: int
    count: int
    first: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    traffic: float | None = None

    def __post_init__(self) -> None:
        if self.contender.system == "bytelm":
            capacity = 1 + self.prompt + self.count
            self.traffic = traffic(self.contender, self.batch, capacity - self.count // 2, capacity)

    def measure(self) -> None:
        steps = self.contender.write(random_prompts(self.batch, self.prompt), self.count)
        began = time.perf_counter()
        next(steps)
        first = time.perf_counter()
        assert sum(1 for _ in steps) == self.count - 1
        self.first.append(first - began)
        self.step.append((time.perf_counter() - first) / (self.count - 1))
        if self.traffic is not None:
            size = {"bf16": 2, "int8": 1}.get(str(plain_name(self.contender.model)[1]), 4)
            held = max(self.traffic, float(size * parameters(self.contender.net)))
            self.share.append(self.traffic / bandwidth(int(held)) / self.step[-1])

    def row(self) -> dict[str, Any]:
        return {
            "bytes_per_s": self.batch / statistics.median(self.step),
            "ms_first_byte": 1e3 * statistics.median(self.first),
            "floor_share": statistics.median(self.share) if self.share else None,
        }


def cells(found: Sequence[Contender], prompts: Sequence[int], batches: Sequence[int], count: int) -> Iterator[Cell]:
    """Cells in an order in which those to be compared are measured at nearly the same time."""
    for prompt in prompts:
        for batch in batches:
            for contender in found:
                if batch * prompt > MOST[contender.system]:
                    print(f"{contender.system} / {contender.model}: not {batch} x {prompt} bytes", file=sys.stderr)
                    continue
                slow = contender.system in ("transformers", "megabyte-pytorch")
                own = min(count, 9 if batch * prompt <= SHORT else 3) if slow else count
                yield Cell(contender, batch, prompt, own)


def measured(table: Sequence[Cell], rounds: int, size: str) -> list[dict[str, Any]]:
    for contender, batch in dict.fromkeys((cell.contender, cell.batch) for cell in table):
        Cell(contender, batch, 64, 2).measure()  # warm-up
    for turn in range(rounds):
        began = time.perf_counter()
        for cell in table if turn % 2 == 0 else reversed(table):
            cell.measure()
        print(f"round {turn + 1} of {rounds}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for cell in table:
        what = {"system": cell.contender.system, "model": cell.contender.model, "size": size}
        rows.append({**what, "batch": cell.batch, "prompt": cell.prompt, **cell.row()})
    return rows


# --- what is shown ----------------------------------------------------------------------------------------------------


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'system':<17}{'model':<19}{'batch':>5}{'prompt':>8}{'bytes/s':>10}{'TTFB (ms)':>16}{'roofline':>10}")
    for row in rows:
        floor = "–" if row["floor_share"] is None else f"{row['floor_share']:.0%}"
        where = f"{row['system']:<17}{row['model']:<19}{row['batch']:>5}{row['prompt']:>8}"
        print(f"{where}{row['bytes_per_s']:>10.1f}{row['ms_first_byte']:>16.1f}{floor:>10}")


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[int, float]]]:
    """Ratios of bytes per second, by name and prompt length."""
    lines: dict[str, dict[int, float]] = {}
    by = {(row["system"], row["model"], row["batch"], row["prompt"]): row["bytes_per_s"] for row in rows}
    for (system, model, batch, prompt), speed in by.items():
        if system != "bytelm":
            continue
        for (peer, theirs, rows_of, length), other in by.items():
            if peer != "bytelm" and (peer == "plain" or theirs == model) and (rows_of, length) == (batch, prompt):
                lines.setdefault(f"{model} / {peer}, batch {batch}", {})[prompt] = speed / other
    for (system, model, batch, prompt), speed in by.items():
        name, weights = plain_name(model)
        if weights == "int8" and (wide := by.get((system, f"{name}-bf16", batch, prompt))):
            lines.setdefault(f"{name}, int8 / bf16, batch {batch}", {})[prompt] = speed / wide
        if batch > 1 and (one := by.get((system, model, 1, prompt))):
            lines.setdefault(f"{system} / {model}, batch {batch} / batch 1", {})[prompt] = speed / one
    yield from lines.items()


def show_ratios(rows: Sequence[dict[str, Any]]) -> None:
    lengths = list(dict.fromkeys(row["prompt"] for row in rows))
    print(f"\n{'ratios of bytes/s after a prompt of':<46}" + "".join(f"{length:>9}" for length in lengths))
    for name, found in ratios(rows):
        print(f"{name:<46}" + "".join(f"{found[n]:>9.2f}" if n in found else f"{'–':>9}" for n in lengths))


def show_curve(rows: Sequence[dict[str, Any]]) -> None:
    prefixes = list(dict.fromkeys(row["prefix"] for row in rows))
    print(f"{'ms per byte after a prefix of':<32}" + "".join(f"{prefix:>9}" for prefix in prefixes))
    for name in dict.fromkeys(row["model"] for row in rows):
        print(f"{name:<32}" + "".join(f"{row['ms_per_byte']:>9.3f}" for row in rows if row["model"] == name))


def forward(model: ByteModel) -> Writer:
    """A model of ours by its forward pass with a state, byte by byte."""

    def write(prompts: Sequence[bytes], count: int) -> Iterator[None]:
        session = Session(PlainDecoder(model, len(prompts), 1 + len(prompts[0]) + count))
        for row, prompt in enumerate(prompts):
            session.submit(Request(prompt, count, Sampling(temperature=0.0), row=row, eos=False))
        while session.rows:
            if session.step():
                yield

    return write


def label(row: dict[str, Any]) -> str:
    """The label of a bar: ours by the model, peers by their name."""
    peers = {"plain": "nanoGPT-like", "megabyte-pytorch": "MEGABYTE-pt."}
    return row["model"] if row["system"] == "bytelm" else peers.get(row["system"], row["system"])


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Throughput of one document, fastest first, one chart per prompt length, as an SVG file."""
    charts: list[tuple[int, int, str]] = []
    for column, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows)):
        own = [row for row in rows if (row["batch"], row["prompt"]) == (1, prompt)]
        own.sort(key=lambda row: -row["bytes_per_s"])
        title = f"kB per second after a prompt of {prompt} bytes"
        bars = [Bar(label(row), row["bytes_per_s"] / 1e3, ours=row["system"] == "bytelm") for row in own]
        charts.append((column, MARGIN, bar_chart(bars, "kB per second", title)))
    return page(charts)


def profile(contender: Contender, batch: int, prompt: int, count: int) -> None:
    """Time a step without a profiler, then with torch's and Python's, which slow it down."""
    steps = contender.write(random_prompts(batch, prompt), 17 + 3 * count)
    sum(1 for _ in islice(steps, 17))
    began = time.perf_counter()
    sum(1 for _ in islice(steps, count))
    took = 1e6 * (time.perf_counter() - began) / count
    print(f"\n{contender.system} / {contender.model}, batch {batch}, after {prompt} bytes: {took:.0f} µs per step")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        sum(1 for _ in islice(steps, count))
    python = cProfile.Profile()
    python.runcall(lambda: sum(1 for _ in islice(steps, count)))
    operators = [(e.key, e.self_cpu_time_total, e.count) for e in seen.key_averages()]
    top("operators of torch", operators, count)
    functions = pstats.Stats(python).stats  # type: ignore[attr-defined]
    top("functions", [(place(*where), 1e6 * own[2], own[1]) for where, own in functions.items()], count)


def place(file: str, line: int, name: str) -> str:
    return name if file == "~" else f"{'/'.join(file.split('/')[-2:])}:{line} {name}"


def top(title: str, found: Sequence[tuple[str, float, int]], steps: int, most: int = 14) -> None:
    """Self time in microseconds, and calls, per step."""
    whole = sum(own for _, own, _ in found)
    print(f"  {title + ', self time':<62}{'µs':>8}{'share':>8}{'calls':>8}   ({whole / steps:.0f} µs in total)")
    for name, own, calls in sorted(found, key=lambda entry: -entry[1])[:most]:
        print(f"    {name[:58]:<60}{own / steps:>8.0f}{own / whole:>8.0%}{calls / steps:>8.1f}")


def options_of(arguments: Sequence[str] | None, sizes: Sequence[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [] if text == "none" else text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument(
        "--models", type=names, help=f"default {','.join(MODELS)}; blt-entropy, transformer-window, -bf16, -int8"
    )
    parser.add_argument("--peers", type=names, default="all", help=f"all, none, or of {','.join(PEERS)}")
    parser.add_argument("--prompts", type=numbers, help=f"default {','.join(map(str, PROMPTS))}")
    parser.add_argument("--long", action="store_true", help=f"prompts of {' and '.join(map(str, LONG))} bytes too")
    parser.add_argument("--batches", type=numbers, default="1,8")
    parser.add_argument("--bytes", type=int, default=BYTES, help="generated after the first (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="default 5, of a curve 1")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture")
    parser.add_argument("--curve", action="store_true", help="how ours slow down with the length of the prefix")
    parser.add_argument("--profile", action="store_true", help="where the time of a step of ours goes")
    options = parser.parse_args(arguments)
    options.peers = [] if options.curve or options.profile else PEERS if options.peers == ["all"] else options.peers
    options.models = options.models or (CURVES if options.curve else MODELS)
    options.prompts = options.prompts or (CURVE if options.curve else [*PROMPTS, *(LONG if options.long else ())])
    known = {*MODELS, *CURVES, "blt-entropy"}
    plain = {plain_name(name)[0] for name in options.models}
    if unknown := set(options.peers) - set(PEERS) | plain - known:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if min(options.bytes, *options.batches, *options.prompts, options.rounds or 1) < 1:
        parser.error("give numbers from 1 up")
    return options


def main(arguments: Sequence[str] | None = None, sizes: dict[str, Shapes] = SIZES) -> int:
    options = options_of(arguments, tuple(sizes))
    capacity = max(64, *options.prompts) + 2 + options.bytes
    found = list(contenders(sizes[options.size], options.models, options.peers, capacity))
    if options.profile:
        for contender in found:
            before = Contender("forward", contender.model, contender.net, forward(contender.net))
            for batch in options.batches:
                profile(before, batch, options.prompts[0], options.bytes)
                profile(contender, batch, options.prompts[0], options.bytes)
        return 0
    batches = [1] if options.curve else options.batches
    table = list(cells(found, options.prompts, batches, 1 + options.bytes))
    rows = measured(table, options.rounds or (1 if options.curve else 5), options.size)
    if options.curve:
        names = {"model": "model", "prompt": "prefix"}
        rows = [{names[k]: row[k] for k in names} | {"ms_per_byte": 1e3 / row["bytes_per_s"]} for row in rows]
    if options.svg is not None:
        write_whole(options.svg, picture(rows).encode())
    if options.json:
        print(json.dumps({"curve" if options.curve else "rows": rows}))
    elif options.curve:
        show_curve(rows)
    else:
        sizes_of = (f"{c.system} / {c.model} {parameters(c.net) / 1e6:.2f}" for c in found)
        print(f"million parameters: {', '.join(sizes_of)}; {torch.get_num_threads()} threads\n")
        show(rows)
        show_ratios(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
