"""How fast known bytes are scored, beside other forward passes over the same windows: bytes per second, in one run.

    python benchmarks/evaluate.py                                  a megabyte, models of about 10M parameters
    python benchmarks/evaluate.py --bytes 65536 --rounds 1 --json
    python benchmarks/evaluate.py --models blt --context 4096 --threads 1

eval          `bytelm eval`: windows of `--context` bytes, each half a context further, and every byte is scored once
logprobs      `LM.logprobs` of half a context after half a context, one call after another
compress      `LM.compress`

bytelm        ours, in float32; BLT with fixed patches of 5 bytes
forward       the same figures by our model's forward pass in torch
transformers  BltForCausalLM with the weights of our BLT, on the same windows and patches; no patcher, no cache
plain         a byte Transformer as in nanoGPT, on the same windows: the baseline for the other two

A rate is that of the bytes that are scored. Peers score the first `--peer-bytes` only. Systems alternate within a
round, every other round in reverse; medians over rounds, and ratios too. transformers' figure must be ours, or the exit
code is 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from converted import text, transformers_blt
from generate import PATCH, SIZES, Shapes, recipe
from peers import Plain, plain_logits
from torch import Tensor
from torch.nn import functional as F

from bytelm.evaluate.bits import measure
from bytelm.exchange.convert import convert
from bytelm.lm import LM, load
from bytelm.machine import processor
from bytelm.patching import fixed
from bytelm.units import BOS

MODELS = ("blt", "megabyte", "transformer")
TASKS = ("eval", "logprobs", "compress")
PEERS = ("forward", "transformers", "plain")
CLOSE = 1e-4  # of two figures, in proportion: float32, summed in other orders
OFFSET, START = 4, 1  # of transformers' BLT: a byte's id, and that of BOS

Score = Callable[[bytes], float]
"""The nats of some bytes, or the bits of their file."""


# --- ours -------------------------------------------------------------------------------------------------------------


def evaluated(lm: LM) -> Score:
    return lambda data: sum(found.nats for found in measure(lm.model, [("", data)], context=lm.context))


def by_calls(lm: LM) -> Score:
    half = lm.context // 2

    def score(data: bytes) -> float:
        parts = [data[begin : begin + half] for begin in range(0, len(data), half)]
        return -sum(float(lm.logprobs(parts[at - 1], part).sum()) for at, part in enumerate(parts))

    return score


def compressed(lm: LM) -> Score:
    return lambda data: 8.0 * len(lm.compress(data))


def by_forward(lm: LM) -> Score:
    """A hook, which no kernel would call, leads to the forward pass."""
    model = copy.deepcopy(lm.model)
    model.register_forward_hook(lambda module, given, out: None)
    return evaluated(LM(model, lm.context))


# --- peers ------------------------------------------------------------------------------------------------------------


def windows(data: bytes, context: int) -> Iterator[tuple[int, Tensor, int]]:
    """Where each window of `evaluate.bits` begins, its ids with the one to be predicted last, and how many are seen."""
    ids, stride = torch.tensor([BOS, *data]), context // 2
    begin = seen = 0
    while len(ids) - 1 - begin > seen:
        yield begin, ids[begin : begin + context + 1], seen
        begin, seen = begin + stride, context - stride


def by_windows(logits: Callable[[Tensor, int], Tensor], context: int, offset: int = 0) -> Score:
    """`logits` of ids `[1, time]`, and of where they begin; a byte's place in them is moved by `offset`."""

    @torch.inference_mode()
    def score(data: bytes) -> float:
        found = 0.0
        for begin, ids, seen in windows(data, context):
            predicted = logits(ids[None, :-1], begin)[0, seen:]
            found += float(F.cross_entropy(predicted, ids[seen + 1 :] + offset, reduction="sum"))
        return found

    return score


def of_transformers(folder: Path, context: int) -> Score:
    """BltForCausalLM from its folder, with the patches of ours: BOS alone, then PATCH bytes each."""
    import transformers

    model: Any = transformers.BltForCausalLM.from_pretrained(folder).eval()

    def logits(ids: Tensor, begin: int) -> Tensor:
        size = ids.shape[1]
        opens = [at for at in range(1, size + 1) if at == 1 or (begin + at - 1) % PATCH == 0]
        lengths = torch.tensor([0, *opens, size + 1]).diff()[None]
        theirs = torch.where(ids == BOS, START, ids + OFFSET)
        return model(input_ids=theirs, patch_lengths=lengths, use_cache=False).logits.float()

    return by_windows(logits, context, OFFSET)


def of_plain(shape: dict[str, Any], context: int) -> Score:
    model = Plain(**shape, capacity=context).eval()
    return by_windows(lambda ids, begin: plain_logits(model, ids), context)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One system at one task with one model."""

    model: str
    system: str
    task: str
    score: Score
    data: bytes
    rates: list[float] = field(default_factory=list)

    def measure(self) -> None:
        began = time.perf_counter()
        assert math.isfinite(self.score(self.data))
        self.rates.append(len(self.data) / (time.perf_counter() - began))


def blt(shape: dict[str, Any] | None, folder: Path, context: int) -> tuple[LM, Score | None]:
    """Our BLT with random weights, and transformers' with the same; of another shape only ours."""
    if shape is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                transformers_blt(folder / "theirs")
            except ImportError as error:
                print(f'skipping transformers ({error}): pip install -e ".[bench]" adds it', file=sys.stderr)
                return blt(SIZES["10M"]["blt"], folder, context)
            convert(folder / "theirs", "hf", folder / "run", {})
            model: Any = load(folder / "run").model
            model.patcher = fixed.Config(size=PATCH).build()
            return LM(model, context), of_transformers(folder / "theirs", context)
    return ours({"blt": shape}, "blt", context), None


def ours(shapes: Shapes, name: str, context: int) -> LM:
    torch.manual_seed(0)
    model = recipe(shapes, name).build()
    model.init_weights(0)
    return LM(model.eval(), context)


def cells(options: argparse.Namespace, shapes: Shapes | None, folder: Path) -> Iterator[Cell]:
    """Those to be compared one after another."""
    data, peers = text(options.bytes), options.peers.split(",")
    part = data[: options.peer_bytes]
    for name in options.models.split(","):
        theirs = None
        if name == "blt":
            lm, theirs = blt(shapes["blt"] if shapes else None, folder, options.context)
        else:
            lm = ours(shapes or SIZES["10M"], name, options.context)
        for task, score in zip(TASKS, (evaluated(lm), by_calls(lm), compressed(lm)), strict=True):
            yield Cell(name, "bytelm", task, score, data)
        if "forward" in peers:
            yield Cell(name, "forward", "eval", by_forward(lm), part)
        if theirs and "transformers" in peers:
            yield Cell(name, "transformers", "eval", theirs, part)
    if "plain" in peers:
        shape = (shapes or SIZES["10M"])["transformer"]
        yield Cell("transformer", "plain", "eval", of_plain(shape, options.context), part)


def apart(table: Sequence[Cell], size: int) -> dict[str, float]:
    """By how much the figures of peers with our weights differ from ours on the first `size` bytes, in proportion."""
    own = {cell.model: cell for cell in table if (cell.system, cell.task) == ("bytelm", "eval")}
    found: dict[str, float] = {}
    for cell in table:
        if cell.system in ("forward", "transformers"):
            data = cell.data[:size]
            found[f"{cell.model}, {cell.system}"] = abs(cell.score(data) / own[cell.model].score(data) - 1)
    return found


def ratios(table: Sequence[Cell]) -> dict[str, float]:
    """Ours by each peer's of the same model, and by plain's; medians over rounds."""
    found: dict[str, float] = {}
    for one in table:
        for peer in table:
            comparable = peer.system == "plain" or peer.model == one.model
            if one.system == "bytelm" != peer.system and comparable:
                rates = zip(one.rates, peer.rates, strict=True)
                found[f"{one.model} {one.task} / {peer.system}"] = statistics.median(a / b for a, b in rates)
    return found


def main(arguments: Sequence[str] | None = None, shapes: Shapes | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--peers", default=",".join(PEERS), help="or none")
    parser.add_argument("--bytes", type=int, default=1 << 20)
    parser.add_argument("--peer-bytes", type=int, default=1 << 15)
    parser.add_argument("--context", type=int, default=1024, help="in bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        table = list(cells(options, shapes, Path(folder)))
    for cell in table:
        cell.score(cell.data[: 2 * options.context])  # warm-up
    differences = apart(table, 4 * options.context)
    for turn in range(options.rounds):
        began = time.perf_counter()
        for cell in table if turn % 2 == 0 else reversed(table):
            cell.measure()
        print(f"round {turn + 1} of {options.rounds}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    told = {"processor": processor(), "threads": options.threads, "context": options.context}
    rows = [
        {"model": cell.model, "system": cell.system, "task": cell.task, "bytes_per_s": statistics.median(cell.rates)}
        for cell in table
    ]
    same = all(difference < CLOSE for difference in differences.values())
    if options.json:
        print(json.dumps({**told, "rows": rows, "ratios": ratios(table), "apart": differences}))
        return 0 if same else 1
    show(told, rows, ratios(table), differences)
    return 0 if same else 1


def show(
    told: dict[str, Any], rows: Sequence[dict[str, Any]], ratios: dict[str, float], apart: dict[str, float]
) -> None:
    print(f"{told['processor']}, {told['threads']} threads, windows of {told['context']} bytes")
    print(f"{'model':<14}{'system':<14}{'task':<10}{'bytes/s':>10}")
    for row in rows:
        print(f"{row['model']:<14}{row['system']:<14}{row['task']:<10}{row['bytes_per_s']:>10,.0f}")
    print("\nratios of bytes/s")
    for name, ratio in ratios.items():
        print(f"{name:<40}{ratio:>8.2f}")
    for name, difference in apart.items():
        print(f"nats of {name}: {difference:.1e} from ours{'' if difference < CLOSE else ', which is TOO FAR'}")


if __name__ == "__main__":
    sys.exit(main())
