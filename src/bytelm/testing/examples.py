"""Examples for the invariants: sequences of every kind of byte, and ways to split, pad and mark them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bytelm.units import BOS, EOS, PAD

LONG = 200  # ids of a row that crosses windows many times, and a block of queries once
SHORT = 24
TIMES = 8  # positions of a sequence that the invariants of causality check
PIECES = (0, 1, 1, 1, 2, 3, 7, 20, 150)
WORDS = ("the", "quick", "fox,", "jumps!", "\n", "", "(a", "b)", "déjà", "vu", "日本", "1024", "\t", "incomprehensible")


def document(rng: random.Random, length: int) -> bytes:
    """`length` bytes of one kind: noise, text, one byte over and over, NULs, every value, a phrase over and over."""
    kinds = (
        bytes(rng.choice((rng.randrange(256), *b"\0\n a")) for _ in range(length)),
        " ".join(rng.choices(WORDS, k=length)).encode(),
        rng.randbytes(1) * length,
        bytes(length),
        bytes((length + 89 * i) % 256 for i in range(length)),
        rng.randbytes(5) * length,
    )
    return rng.choice(kinds)[:length]


def row(rng: random.Random, length: int) -> Int[Tensor, " time"]:
    """Packed documents, EOS between them or not; one sequence in four begins in the middle of a document."""
    ids = [BOS] if rng.random() < 0.75 else []
    while len(ids) < length:
        ids += document(rng, rng.choice((0, 1, 8, 30, 60)))
        ids += rng.choice(([BOS], [EOS, BOS]))
    return torch.tensor(ids[:length])


def rows(rng: random.Random, count: int) -> list[Int[Tensor, " time"]]:
    """`count` rows, the first of them long."""
    lengths = [LONG] + [rng.randint(SHORT // 4, SHORT) for _ in range(count - 1)]
    return [row(rng, length) for length in lengths]


def marks(rng: random.Random, length: int) -> Bool[Tensor, " time"]:
    """Recorded boundaries as no patcher would set them: none, some, or all."""
    share = rng.choice((0.0, 0.1, 0.5, 1.0))
    return torch.tensor([rng.random() < share for _ in range(length)], dtype=torch.bool)


def pieces(rng: random.Random, length: int) -> Iterator[slice]:
    """A chunking of `length` ids, with single ids and empty chunks."""
    start = 0
    while start < length:
        size = rng.choice(PIECES)
        yield slice(start, start + size)
        start += size


def padded(
    rng: random.Random, parts: Sequence[Int[Tensor, " _"]]
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """A batch with one part per row, PADs anywhere, and the positions of its real ids."""
    width = max(map(len, parts)) + rng.randint(0, 3)
    real = torch.zeros(len(parts), width, dtype=torch.bool)
    for index, part in enumerate(parts):
        size = len(part)
        places = rng.choice((range(size), range(width - size, width), sorted(rng.sample(range(width), size))))
        real[index, list(places)] = True
    ids = torch.full((len(parts), width), PAD)
    ids[real] = torch.cat(list(parts))
    return ids, real


def whole_document(rng: random.Random, length: int) -> Int[Tensor, " time"]:
    """BOS, `length` bytes of one kind, and EOS or none."""
    return torch.tensor([BOS, *document(rng, length), *rng.choice(([], [EOS]))])


def moments(rng: random.Random, length: int) -> list[int]:
    """Positions of a sequence to check: the last, and some of the others."""
    return [length - 1, *rng.sample(range(length), min(length, TIMES))]
