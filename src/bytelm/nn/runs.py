"""Attention over runs: lines of queries and of keys, cut into pieces of any length that do not see each other.

    queries    0 . . . . 5 . 7 . .          runs of 5, 2 and 3 queries      cumulative: 0 5 7 10
    keys       0 . . . . . . 7 . 9 . .      of 7, 2 and 3 keys              cumulative: 0 7 9 12

Query i of n sees, of the m keys of its run, number i + m - n, and those before it within its window: both ends
are aligned, and cached keys come first. So full and windowed attention, documents in a row, caches and rows
of any length are one kernel without a mask (FlashAttention by cumulative lengths: Dao 2023, arXiv 2307.08691), which
GPUs have for numbers of 16 bits. Elsewhere `nn.attention` goes by masks, which are the definition.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.transfer import to_device

KINDS = (torch.bfloat16, torch.float16)
WIDEST = 256  # numbers in a head; always a multiple of 8
MOST = 65_535  # runs in a call: a grid of CUDA has no more
TILE = 128  # queries that the kernel works on at a time: gradients of each run are kept in whole tiles
ROOM = 1 << 31  # numbers of such gradients: the kernel counts them in 32 bits


@functools.cache
def present(device: str) -> bool:
    """Whether devices of this type have the kernel: those of CUDA do, from compute capability 8.0 on."""
    if device != "cuda" or torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0) and answers()


def answers() -> bool:
    """Whether the kernel takes a call; it is warned where it does not, as another version of torch may not."""
    one, ends = torch.ones(1, 1, 8, dtype=KINDS[0], device="cuda"), torch.arange(2, dtype=torch.int32, device="cuda")
    try:
        kernel(one, one, one, Runs(ends, ends, 1, 1, 1))
    except Exception as error:  # whatever another version of torch may raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"variable-length attention fails here, using masked attention (slower): {told}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def known(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel for heads of this kind."""
    return dtype in KINDS and head_dim % 8 == 0 and head_dim <= WIDEST


def attends(x: Tensor, head_dim: int) -> bool:
    """Whether a stack over `x` in heads of this width will find its attention here."""
    device = x.device.type
    if not present(device) or not x.numel():
        return False
    rounded = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return known(torch.get_autocast_dtype(device) if rounded else x.dtype, head_dim)


@dataclass(frozen=True)
class Runs:
    """How lines of queries and keys are divided. Each query is in a run: the kernel writes no others."""

    queries: Int[Tensor, " ends"]
    """Where each run of queries begins, and where the last one ends: int32, where attention is computed."""
    keys: Int[Tensor, " ends"]
    """The same of keys."""
    most_queries: int
    """Queries of the longest run."""
    most_keys: int
    window: int | None
    """Keys that a query sees, its own included; None for all up to its own."""

    @classmethod
    def of(
        cls, queries: Int[Tensor, " ends"], keys: Int[Tensor, " ends"], window: int | None, device: torch.device
    ) -> Runs:
        """From where runs begin and end, on the host.

        They are filled up to a power of two with runs of nothing, so that shapes come again from call to call.
        """
        most_queries, most_keys = (int(ends.diff().max()) for ends in (queries, keys))
        both = torch.stack([queries, keys]).int()
        count = len(queries) - 1
        spare = (1 << (count - 1).bit_length()) - count
        both = torch.cat([both, both[:, -1:].expand(-1, spare)], 1)
        begin, begin_of_keys = to_device(both, device).unbind()  # one copy
        return cls(begin, begin_of_keys, most_queries, most_keys, window)

    def fits(self, query: Float[Tensor, "... heads head_dim"]) -> bool:
        """Whether the kernel takes such queries in these runs, and their gradients."""
        count, (heads, head_dim) = len(self.queries) - 1, query.shape[-2:]
        gradients = (query.numel() // (heads * head_dim) + TILE * count) * heads * max(32, head_dim)
        return known(query.dtype, head_dim) and query.numel() > 0 and count <= MOST and gradients < ROOM

    def attend(
        self,
        query: Float[Tensor, "queries heads head_dim"],
        keys: Float[Tensor, "slots key_heads head_dim"],
        values: Float[Tensor, "slots key_heads head_dim"],
    ) -> Float[Tensor, "queries heads head_dim"]:
        """What each query mixes of the values of its run."""
        keys, values = (x.to(query.dtype).expand(-1, query.shape[1], -1) for x in (keys, values))
        return kernel(query, keys, values, self)


def causal(opens: Int[Tensor, "batch new"], cached: int, window: int | None, device: torch.device) -> Runs | None:
    """The runs of rows of new queries, each behind `cached` keys; None where there is no kernel.

    `opens`: the slot of its row at which the document of each query starts. What is cached of another document is a run
    without queries, empty as it may be.
    """
    if not opens.numel() or not present(device.type):
        return None
    batch, new = opens.shape
    cut = opens == cached + torch.arange(new)
    cut[:, 0] = True
    queries = cut.flatten().nonzero()[:, 0]
    keys = queries // new * (cached + new) + opens.flatten()[queries]
    rows = torch.arange(batch + 1)[0 if cached else batch :]  # where a row starts is a cut as well if much lies before
    queries, keys = torch.cat([queries, rows * new]), torch.cat([keys, rows * (cached + new)])
    return Runs.of(queries.sort().values, keys.sort().values, window, device)


def kernel(
    query: Float[Tensor, "queries heads head_dim"],
    keys: Float[Tensor, "slots heads head_dim"],
    values: Float[Tensor, "slots heads head_dim"],
    runs: Runs,
) -> Float[Tensor, "queries heads head_dim"]:
    """Scaled dot-product attention inside runs, by the kernel that torch has."""
    from torch.nn.attention.varlen import varlen_attn  # imported late: it loads torch's compiler

    window = (-1 if runs.window is None else runs.window - 1, 0)  # keys before the own one, and after it
    most = (runs.most_queries, runs.most_keys)
    out = varlen_attn(query, keys, values, runs.queries, runs.keys, *most, window_size=window)
    assert isinstance(out, Tensor)  # a tuple only where more was asked for
    return out
