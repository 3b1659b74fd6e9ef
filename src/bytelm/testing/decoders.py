"""Invariants of every decoder: the contract of `decoding.open_decoder(model, ...)`.

invariant    statement
forward      logits equal those of the model's forward pass, in float64
company      batch and chunking invariance, bitwise if the decoder `repeats`
prefill      reading with the logits of some ids alone gives those, and continues, bitwise the same
again        rollback after a draft or a read restores the state; so does a reset
rounding     with quantized weights, logits equal those of a model with such weights, but for bf16 caches
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bytelm.decoding import Decoder, Quantization, open_decoder, rounded
from bytelm.decoding.host import Host
from bytelm.interfaces.model import ByteModel
from bytelm.testing.exact import exact
from bytelm.testing.examples import LONG, SHORT, document
from bytelm.testing.invariant import EXAMPLES, agree
from bytelm.testing.models import BOUND
from bytelm.units import BOS

CAPACITY = LONG + 40
LOOSE = 1e-4  # where torch rounds differently in another batch
ROUNDED: tuple[Quantization, ...] = ("bf16", "int8")
HALF = 0.01  # root mean square of what caches in bf16 change, to the spread of the logits


def check_decoder(model: ByteModel, *, seed: int = 0, examples: int = EXAMPLES) -> dict[str, float]:
    """Check every invariant below. Returns the worst difference by invariant; raises LawError."""
    return {name: invariant(model, seed, examples) for name, invariant in DECODER_INVARIANTS.items()}


def documents(rng: random.Random, count: int) -> list[list[int]]:
    """BOS and bytes; the first of them is long."""
    lengths = [LONG] + [rng.randint(1, SHORT) for _ in range(count - 1)]
    return [[BOS, *document(rng, length)] for length in lengths]


def wanted(model: ByteModel, lines: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the model says after each id of each document."""
    with torch.no_grad():
        return [model(torch.tensor([ids]))[0][0] for ids in lines]


def read(decoder: Decoder, lines: Sequence[Sequence[int]], pieces: Callable[[], int]) -> list[Tensor]:
    """The same from a decoder, each call of which is given `pieces()` more ids of a row; rows end in turn."""
    found: list[list[np.ndarray]] = [[] for _ in lines]
    while True:
        rows: list[int] = []
        ids: list[int] = []
        for row, line in enumerate(lines):
            part = line[len(found[row]) :][: pieces()]
            rows += [row] * len(part)
            ids += part
        if not ids:
            if all(len(done) == len(line) for done, line in zip(found, lines, strict=True)):
                return [torch.from_numpy(np.stack(logits)) for logits in found]
            continue
        for row, logits in zip(rows, decoder.read(np.array(rows), np.array(ids)), strict=True):
            found[row].append(logits)


def bound(decoder: Decoder) -> float:
    """By how much the logits of one row may differ from time to time."""
    return 0.0 if decoder.repeats else LOOSE


@contextmanager
def small_rings() -> Generator[None]:
    """Ring buffers of windows that the documents here go around."""
    chunk, Host.chunk = Host.chunk, 64
    try:
        yield
    finally:
        Host.chunk = chunk


@torch.no_grad()
@small_rings()
def forward(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Reading documents, in chunks and rows of all sizes, gives the logits of the model's own forward pass."""
    rng, worst = random.Random(seed), 0.0
    lines = documents(rng, examples)
    with exact(model) as precise:
        decoder = open_decoder(precise, rows=len(lines), capacity=CAPACITY)
        found = read(decoder, lines, lambda: rng.choice((0, 1, 1, 5, 40)))
        for one, other in zip(found, wanted(precise, lines), strict=True):
            worst = max(worst, agree("forward", model, one, other, f"a document of {len(one)}", BOUND))
    return worst


@torch.no_grad()
@small_rings()
def company(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """A row is bitwise identical alone and in a batch, in chunks of any size, with one thread and with more."""
    rng, worst = random.Random(seed), 0.0
    lines, threads = documents(rng, examples), torch.get_num_threads()
    together = read(open_decoder(model, rows=len(lines), capacity=CAPACITY), lines, lambda: rng.choice((0, 1, 5, 40)))
    try:
        for row, line in enumerate(lines):
            torch.set_num_threads(1 + row % 2)
            decoder = open_decoder(model, rows=1, capacity=CAPACITY)
            alone = read(decoder, [line], partial(int, 1 + row % 3))[0]
            where = f"a document of {len(line)}, alone and in a batch"
            worst = max(worst, agree("batch_invariance", model, alone, together[row], where, bound(decoder)))
    finally:
        torch.set_num_threads(threads)
    return worst


@torch.no_grad()
@small_rings()
def prefill(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Logits of wanted ids equal those of a reading that computes all."""
    rng, worst = random.Random(seed), 0.0
    lines = documents(rng, examples)
    rows = np.arange(len(lines))
    whole, part = (open_decoder(model, rows=len(lines), capacity=CAPACITY) for _ in range(2))
    while any(whole.lengths < [len(line) for line in lines]):
        ids = [line[int(n) :][: rng.choice((1, 5, 40))] for line, n in zip(lines, whole.lengths, strict=True)]
        row, new = rows.repeat([len(some) for some in ids]), np.concatenate([np.array(some, np.int64) for some in ids])
        wanted = np.array([rng.random() < 0.1 for _ in row])
        found, other = part.read(row, new, wanted), whole.read(row, new)[wanted]
        where = f"{wanted.sum()} of {len(row)} ids"
        if len(found):
            pair = torch.from_numpy(found), torch.from_numpy(other)
            worst = max(worst, agree("prefill", model, *pair, where, bound(whole)))
    return worst


@torch.no_grad()
@small_rings()
def again(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Reading after a rollback, or after a reset, is as if the rolled-back ids had not been read."""
    rng, worst = random.Random(seed), 0.0
    lines = documents(rng, examples)
    decoder = open_decoder(model, rows=1, capacity=CAPACITY)
    first = np.zeros(1, np.int64)
    for line in lines:
        once = read(decoder, [line], lambda: 7)
        decoder.rollback(first, first)
        twice: list[Tensor] = []
        while len(twice) < len(line):
            before = decoder.lengths.copy()
            for _ in range(rng.choice((0, 1, 9)) if decoder.drafts else 0):
                decoder.draft(first, np.array([rng.randrange(256)]))
            decoder.rollback(first, before)
            part = np.array(line[len(twice) :][: rng.choice((1, 6))])
            if decoder.repeats:
                other = np.array([rng.randrange(256) for _ in range(rng.choice((1, 20)))])
                decoder.read(first.repeat(len(other)), other)
                decoder.rollback(first, before)
            twice += torch.from_numpy(decoder.read(np.repeat(first, len(part)), part))
        where = f"a document of {len(line)} after going back"
        worst = max(worst, agree("again", model, torch.stack(twice), once[0], where, bound(decoder)))
        decoder.rollback(first, first)
    return worst


@torch.no_grad()
@small_rings()
def rounding(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """With rounded weights, the root mean square from a model that holds such weights is a small part of the spread.

    Of a model that learns its boundaries, before the first that is decided otherwise: where a probability is nearly one
    half caches in bfloat16 do so, and what follows is another reading.
    """
    worst, lines = 0.0, documents(random.Random(seed), examples)
    for weights in ROUNDED:
        decoder = open_decoder(model, rows=len(lines), capacity=CAPACITY, quantize=weights)
        found = read(decoder, lines, lambda: 40)
        other = rounded(model, weights)
        pairs = [(one[:same], two[:same]) for one, two, same in alike(decoder, other, lines, found)]
        ours, theirs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        apart = ((ours - theirs).square().mean() / theirs.var().clamp(min=1e-12)).sqrt()
        worst = max(worst, agree("rounding", model, apart[None], torch.zeros(1), f"weights in {weights}", HALF))
    return worst


def alike(
    decoder: Decoder, model: ByteModel, lines: Sequence[Sequence[int]], found: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Logits of both for each document, and up to which id both have decided the same boundaries: all by default."""
    for row, (ids, own) in enumerate(zip(lines, found, strict=True)):
        (theirs,) = wanted(model, [ids])
        depth = decoder.depth(row)
        differ = [] if depth is None or model.chunking is None else (model.chunking.depth[0].numpy() != depth)
        yield own, theirs, int(np.argmax(differ)) if np.any(differ) else len(ids)


DECODER_INVARIANTS: dict[str, Callable[[ByteModel, int, int], float]] = {
    "forward": forward,
    "batch_invariance": company,
    "prefill": prefill,
    "again": again,
    "rounding": rounding,
}
