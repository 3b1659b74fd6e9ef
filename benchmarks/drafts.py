"""What drafts bring: bytes per second with each source of guesses over those without, the same bytes each time.

    python benchmarks/drafts.py --run runs/demo                      the run's own model
    python benchmarks/drafts.py --run runs/demo --grow 100           the same model at the speed of 100M parameters
    python benchmarks/drafts.py --run runs/demo --quantize bf16 --temperatures 0,0.8 --json

Prompts are cut from the run's held-out documents; one row writes. Ways alternate within a round; medians over rounds of
the ratio to no drafts. "memory, primed" begins with the run's memory (`bytelm prime`), where it has one.

--grow: feed-forward layers are widened by units that add nothing. The model writes what it wrote before, and a step
reads the weights of a larger one: what is written is a small model's, the time a large one's. A large model's own text
is more predictable to itself and less to a memory; how much, this does not tell.

right       share of guessed bytes that the model agreed with
bytes/pass  bytes written per pass of the model
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bytelm.checkpoint.assemble import load
from bytelm.data.corpora import open_corpus
from bytelm.decoding import open_decoder
from bytelm.generate.request import Request
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import Session
from bytelm.generate.speculate import NONE, Draft, drafts_of
from bytelm.interfaces.model import ByteModel
from bytelm.machine import processor
from bytelm.nn.products import Linear
from bytelm.nn.transformer import FeedForward, Stack
from bytelm.online.memory import Memory

Way = tuple[str, Draft, Callable[[], Memory] | None]


def grown(model: ByteModel, millions: float) -> ByteModel:
    """The same function with more parameters to read: the added units of feed-forward layers have no way out."""
    stacks = [part for part in model.modules() if isinstance(part, Stack)]
    layers = [part for stack in stacks for part in stack.modules() if isinstance(part, FeedForward)]
    wide = sum(one.weight.numel() for part in layers for one in part.children())
    factor = (millions * 1e6 - linear_parameters(model) + wide) / wide
    if factor < 1:
        return model
    for stack in stacks:
        dim, hidden = stack.config.dim, stack.config.hidden()
        more = round((factor - 1) * hidden / 64) * 64
        stack.config = replace(stack.config, ffn_dim=hidden + more)
        for part in stack.modules():
            if isinstance(part, FeedForward):
                widen(part, dim, more)
    return model.eval().requires_grad_(False)


def widen(part: FeedForward, dim: int, more: int) -> None:
    gate, up = part.gate_up.weight.data.chunk(2)
    added = torch.randn(2, more, dim, generator=torch.Generator().manual_seed(more)) * dim**-0.5
    wide = FeedForward(dim, len(gate) + more)
    wide.gate_up.weight.data = torch.cat([gate, added[0], up, added[1]])
    wide.down.weight.data = torch.cat([part.down.weight.data, torch.zeros(dim, more)], 1)
    part.gate_up, part.down = wide.gate_up, wide.down


def linear_parameters(model: ByteModel) -> int:
    """Those that every step reads: tables of n-grams and of bytes are not among them."""
    return sum(part.weight.numel() for part in model.modules() if isinstance(part, Linear))


def prompts_of(run: Path, count: int, length: int) -> list[bytes]:
    """The beginnings of held-out documents that are long enough, and then of pieces of them."""
    corpus, found = open_corpus(run / "data"), list[bytes]()
    for split in ("test", "valid"):
        for table in corpus.tables(split):
            for start, size in zip(table.starts.tolist(), table.sizes.tolist(), strict=True):
                for at in range(start, start + size - 2 * length, max(2 * length, size // 4)):
                    found.append(bytes(corpus.read(at, length)))
    if not found:
        raise SystemExit(f"{run}: no held-out document has {2 * length} bytes: give a smaller --prompt")
    return found[:: max(1, len(found) // count)][:count]


def ways(model: ByteModel, primed: Path) -> Iterator[Way]:
    yield "none", NONE, None
    for draft in drafts_of(open_decoder(model, rows=1, capacity=64))[1:]:
        if draft.source == "local":
            yield f"local, {draft.length}", draft, None
        else:
            yield "memory, empty", draft, None
            if primed.exists():
                yield "memory, primed", draft, partial(Memory.load, primed)


def timed(model: ByteModel, way: Way, prompt: bytes, options: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """One request: what it wrote and how; the seconds are those after its first byte."""
    _, draft, memory = way
    decoder = open_decoder(model, rows=1, capacity=1 + len(prompt) + options.bytes, quantize=options.quantize)
    session = Session(decoder, [draft], read_before=memory)
    session.submit(Request(prompt, options.bytes, sampling, seed=1, eos=False))
    text = b""
    while not text:
        text += b"".join(piece.data for piece in session.step())
    if draft.source == "memory":
        session.guesser(0)  # its making is not measured: it is made once for a document
    began, first, passes = time.perf_counter(), len(text), 0
    while session.rows:
        text += b"".join(piece.data for piece in session.step())
        passes += 1
    seconds, speculation = time.perf_counter() - began, session.speculation
    return {"text": text, "seconds": seconds, "bytes": len(text) - first, "passes": passes} | {
        "drafted": speculation.drafted,
        "accepted": speculation.accepted,
    }


def compared(model: ByteModel, options: argparse.Namespace, temperature: float) -> Iterator[dict[str, Any]]:
    sampling = Sampling(temperature)
    found = list(ways(model, options.run / "memory.bin"))
    cells: dict[str, list[dict[str, Any]]] = {way[0]: [] for way in found}
    for turn, prompt in enumerate(prompts_of(options.run, options.rounds, options.prompt)):
        for way in found[:: 1 if turn % 2 else -1]:
            cells[way[0]].append(timed(model, way, prompt, options, sampling))
            if options.progress:
                print(f"\rround {turn + 1} of {options.rounds}: {way[0]:<16}", end="", file=sys.stderr, flush=True)
    for name, lines in cells.items():
        base = cells["none"]
        if any(one["text"] != other["text"] for one, other in zip(lines, base, strict=True)):
            raise SystemExit(f"drafts of {name} changed what was written: this is a bug")
        total = {key: sum(line[key] for line in lines) for key in ("bytes", "passes", "drafted", "accepted", "seconds")}
        yield {
            "temperature": temperature,
            "drafts": name,
            "bytes_per_s": total["bytes"] / total["seconds"],
            "right": total["accepted"] / total["drafted"] if total["drafted"] else None,
            "bytes_per_pass": total["bytes"] / total["passes"],
            "speed": statistics.median(o["seconds"] / n["seconds"] for o, n in zip(base, lines, strict=True)),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--grow", type=float, help="millions of parameters that a step is to read")
    parser.add_argument("--quantize", choices=("bf16", "int8"))
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--prompt", type=int, default=1024, help="bytes of each prompt")
    parser.add_argument("--bytes", type=int, default=256, help="bytes that are written")
    parser.add_argument("--rounds", type=int, default=6, help="prompts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.progress = sys.stderr.isatty()
    model = load(options.run).model
    if options.grow:
        model = grown(model, options.grow)
    size = linear_parameters(model)
    rows = [row for text in options.temperatures.split(",") for row in compared(model, options, float(text))]
    if options.json:
        print(json.dumps({"processor": processor(), "parameters": size, "rows": rows}))
        return 0
    print(f"{processor()}; {size / 1e6:.1f}M parameters in linear layers, {options.quantize or 'float32'}")
    print(f"{'temperature':<13}{'drafts':<17}{'bytes/s':>8}{'right':>7}{'bytes/pass':>12}{'speed':>7}")
    for row in rows:
        right = "" if row["right"] is None else f"{row['right']:.0%}"
        print(
            f"{row['temperature']:<13}{row['drafts']:<17}{row['bytes_per_s']:>8.0f}{right:>7}"
            f"{row['bytes_per_pass']:>12.2f}{row['speed']:>7.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
