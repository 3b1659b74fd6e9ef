"""Tables of more than 2^31 elements: correctness of torch's operators, one per process, and a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.config import preset
from stages.bench import Bench, Found, Measurement
from stages.steps import COLUMNS as STEP_COLUMNS
from stages.steps import Shape, step

SECONDS, EACH = 40, 40
COLUMNS = ("right", *STEP_COLUMNS[:8])
ROWS, DIM, READ = 6 * 500_002, 768, 4 * 8192 * 6


def index_select(table: Tensor, rows: Tensor) -> Tensor:
    return table.index_select(0, rows)


def embedding_bag(table: Tensor, rows: Tensor) -> Tensor:
    return F.embedding_bag(rows[:, None], table, mode="sum")


def sparse_slopes(table: Tensor, rows: Tensor) -> Tensor:
    """The gradient of a sum of rows, added up a row; less 1 it is 0."""
    table.requires_grad_()
    F.embedding_bag(rows[:, None], table, mode="sum", sparse=True).sum().backward()
    assert table.grad is not None
    return table.grad.coalesce().values() - 1 + table.detach()[rows]


def index_add(table: Tensor, rows: Tensor) -> Tensor:
    table.index_add_(0, rows, torch.ones(len(rows), table.shape[1], device=table.device))
    return table[rows] - 1


def index_copy(table: Tensor, rows: Tensor) -> Tensor:
    return table.index_copy_(0, rows, table[rows] + 1)[rows] - 1


OPERATORS = (index_select, embedding_bag, sparse_slopes, index_add, index_copy)


def tried(bench: Bench, operator: Callable[[Tensor, Tensor], Tensor]) -> Found:
    """On rows near the end, each once and in order, which hold their own number."""
    count, dim, read = bench.size((ROWS, DIM, READ), (600, 16, 60))
    table = torch.zeros(count, dim, device=bench.device)
    rows = torch.arange(count - read, count, device=bench.device)
    table[-read:] = (rows % 1000).float()[:, None]
    right = bool((operator(table, rows) == (rows % 1000).float()[:, None]).all())
    return {"right": right, "numbers": table.numel()} | ({} if right else {"failed": "wrong numbers"})


def measurements(bench: Bench) -> Iterator[Measurement]:
    for operator in OPERATORS:
        yield operator.__name__, partial(tried, bench, operator)
    shallow = {"decoder_layers": 1, "global_layers": 1}
    if not bench.pretend:  # or it is the one of `steps`
        yield "a step of blt-400m, shallow", partial(step, bench, Shape(preset("blt-400m")["model"] | shallow, 2, 8192))
