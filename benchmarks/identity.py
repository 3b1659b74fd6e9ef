"""Batch and chunking invariance of greedy generation: five prompts, every way to compute them, every model.

    python benchmarks/identity.py                                random weights of about 10M parameters
    python benchmarks/identity.py --runs runs/notes runs/code    trained models, and how often their drafts are right
    python benchmarks/identity.py --bytes 4096 --prompts a.txt b.txt --json

Every way is compared with the decoder at batch 1:

batch               the five prompts in one session, with ragged lengths
chunks of 7         prefill in chunks of 7 bytes
one thread
local drafts        of 4 and of 8 bytes: self-speculative decoding (BLT and MEGABYTE)
memory drafts       of what an online memory of the text guesses
forward, cached     the model's forward pass, byte by byte with its state
forward, whole      its forward pass over the whole text at once: the most likely byte at every place
forward, compiled   the same with its blocks compiled

For a way that differs, the first differing place is printed, with the gap of the two most likely bytes there: forward
passes round differently, and near ties may fall either way.

With --runs, also the acceptance rate of drafts, greedily and at temperature 0.8, the bytes per verifying pass, and the
speed-up by drafts.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generate
import torch

from bytelm.checkpoint.assemble import load
from bytelm.decoding import Decoder, open_decoder
from bytelm.decoding.plain import PlainDecoder
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import Request, Session
from bytelm.generate.speculate import NONE, Draft, Speculation, drafts_of
from bytelm.interfaces.model import ByteModel
from bytelm.nn.transformer import Block
from bytelm.units import BOS, BYTES

GREEDY = Sampling(temperature=0.0)
MODELS = ("blt", "blt-entropy", "megabyte", "megabyte-3", "transformer", "transformer-window")
PROMPTS = (b"", b"The ", b"def main(", bytes(range(256)), b"It was a bright cold day in April, and the clocks " * 8)
ROUNDS = 5


@dataclass(frozen=True)
class Written:
    texts: list[bytes]
    speculation: Speculation
    seconds: float
    passes: int


def written(decoder: Decoder, prompts: Sequence[bytes], count: int, draft: Draft = NONE, **options: Any) -> Written:
    """All prompts in one session."""
    session = Session(decoder, [draft])
    texts, passes = [b""] * len(prompts), 0
    of = {}
    for row, prompt in enumerate(prompts):
        own: dict[str, Any] = {"sampling": GREEDY, "row": row, "eos": False, **options}
        of[session.submit(Request(prompt, count, **own))] = row
    began = time.perf_counter()
    while session.rows:
        passes += 1
        for piece in session.step():
            texts[of[piece.row]] += piece.data
    return Written(texts, session.speculation, time.perf_counter() - began, passes)


def alone(open_one: Callable[[], Decoder], prompts: Sequence[bytes], count: int, draft: Draft = NONE) -> list[bytes]:
    return [written(open_one(), [prompt], count, draft).texts[0] for prompt in prompts]


@torch.inference_mode()
def whole(model: ByteModel, prompts: Sequence[bytes], texts: Sequence[bytes]) -> list[bytes]:
    """The most likely byte at every place of given texts, by one forward pass."""
    found: list[bytes] = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[BOS, *prompt, *text]])[:, :-1]
        found.append(bytes(model(ids)[0][0, len(prompt) :, :BYTES].argmax(-1).tolist()))
    return found


def compiled(model: ByteModel) -> ByteModel:
    fast = copy.deepcopy(model)
    for module in fast.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)
    return fast


def named(draft: Draft) -> str:
    return f"{draft.source} drafts of {draft.length}"


def ways(
    model: ByteModel, prompts: Sequence[bytes], count: int, base: list[bytes]
) -> Iterator[tuple[str, list[bytes]]]:
    capacity = 1 + max(map(len, prompts)) + count

    def opened(rows: int = 1) -> Decoder:
        return open_decoder(model, rows=rows, capacity=capacity)

    def in_chunks() -> Decoder:
        decoder = opened()
        decoder.chunk = 7
        return decoder

    yield "batch", written(opened(len(prompts)), prompts, count).texts
    yield "chunks of 7", alone(in_chunks, prompts, count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield "one thread", alone(opened, prompts, count)
    torch.set_num_threads(threads)
    for draft in drafts_of(opened())[1:]:
        yield named(draft), alone(opened, prompts, count, draft)
    yield "forward, cached", alone(lambda: PlainDecoder(model, 1, capacity), prompts, count)
    yield "forward, whole", whole(model, prompts, base)
    yield "forward, compiled", whole(compiled(model), prompts, base)


def difference(model: ByteModel, prompts: Sequence[bytes], base: Sequence[bytes], other: Sequence[bytes]) -> str:
    """The first place at which two ways differ, and the gap of the two most likely bytes there."""
    for prompt, one, two in zip(prompts, base, other, strict=True):
        for place, (a, b) in enumerate(zip(one, two, strict=True)):
            if a != b:
                with torch.inference_mode():
                    logits = model(torch.tensor([[BOS, *prompt, *one[:place]]]))[0][0, -1, :BYTES]
                top = logits.topk(2).values
                return f"byte {place} after {prompt[:9]!r}, where {float(top[0] - top[1]):.1e} divides two bytes"
    return ""


def acceptance(model: ByteModel, prompts: Sequence[bytes], count: int) -> Iterator[dict[str, Any]]:
    """Acceptance rates and speed-ups of drafts."""
    capacity = 1 + max(map(len, prompts)) + count
    decoder = open_decoder(model, rows=1, capacity=capacity)
    for temperature in (0.0, 0.8):
        options = {"sampling": Sampling(temperature), "seed": 1}
        for draft in drafts_of(decoder)[1:]:
            found: list[Written] = []
            ratio: list[float] = []
            for turn in range(ROUNDS):
                prompt = [prompts[turn % len(prompts)]]
                with_drafts = written(decoder, prompt, count, draft, **options)
                without = written(decoder, prompt, count, **options)
                assert with_drafts.texts == without.texts
                found.append(with_drafts)
                ratio.append(without.seconds / with_drafts.seconds)
            drafted = sum(one.speculation.drafted for one in found)
            accepted = sum(one.speculation.accepted for one in found)
            yield {"temperature": temperature, "draft": named(draft), "accepted": accepted / max(1, drafted)} | {
                "bytes_per_pass": sum(len(one.texts[0]) for one in found) / sum(one.passes for one in found),
                "speed": statistics.median(ratio),
            }


def models_of(options: argparse.Namespace) -> Iterator[tuple[str, ByteModel]]:
    for run in options.runs:
        yield run.name, load(run).model
    if not options.runs:
        for name in options.models:
            model = generate.recipe(generate.SIZES[options.size], name).build()
            model.init_weights(0)
            yield name, model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=MODELS)
    parser.add_argument("--size", choices=tuple(generate.SIZES), default="10M")
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--prompts", type=Path, nargs="+", default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    prompts = [path.read_bytes() for path in options.prompts] or list(PROMPTS)
    rows: list[dict[str, Any]] = []
    drafts: list[dict[str, Any]] = []
    for name, model in models_of(options):
        capacity = 1 + max(map(len, prompts)) + options.bytes
        base = alone(lambda: open_decoder(model, rows=1, capacity=capacity), prompts, options.bytes)  # noqa: B023
        for way, found in ways(model, prompts, options.bytes, base):
            where = difference(model, prompts, base, found)
            rows.append({"model": name, "way": way, "bytes": sum(map(len, base)), "same": not where, "where": where})
            if not options.json:
                print(f"{name:<20}{way:<20}{sum(map(len, base)):>8} bytes  {where or 'the same'}", flush=True)
        if options.runs:
            drafts += [{"model": name, **row} for row in acceptance(model, prompts, options.bytes)]
    if options.json:
        print(json.dumps({"rows": rows, "drafts": drafts}))
    for row in drafts if not options.json else ():
        shares = f"{row['accepted']:.0%} of drafts accepted, {row['bytes_per_pass']:.2f} bytes per pass"
        print(f"{row['model']:<20}{row['draft']} at {row['temperature']}: {shares}, speed x {row['speed']:.2f}")
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
