"""Decoders on a device: the parts of decoders as tensors, with whole numbers planned on the host.

    host    ids, rows, positions, patches → plan [numbers, positions]     one copy a part, from pinned memory
                                     │
    device  activations ─► part ─────▼────► activations ─► next part      a CUDA graph for each shape of a plan
                            rings, which stay where they are

Position p of a row lies in slot p mod slots of its ring. Rows have the lengths of a batch filled up: rows, new
positions and positions seen are powers of two, so that few shapes are met. What fills up writes into a spare row.
Weights in bfloat16 stay so, as do caches; what is between layers, norms and logits are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bytelm.decoding import blt, megabyte
from bytelm.decoding.base import Ints, New, Reals, fetched
from bytelm.models.blt import BLT
from bytelm.models.megabyte import Inner
from bytelm.native.kernels import Kernels
from bytelm.nn.concatenate import PatchEmbedding
from bytelm.nn.cross import CrossAttention
from bytelm.nn.embed import NgramEmbedding
from bytelm.nn.norm import EPS
from bytelm.nn.transformer import Block, Stack
from bytelm.transfer import to_device
from bytelm.units import PAD, VOCAB

CHUNK = 256  # ids of one row that are read at once at the most
GRAPHED = 256  # positions of a shape above which launches cost less than arithmetic, and no graph is kept
TOGETHER = 4096  # positions of rows with several new ones that are computed at once
LEAST = 16  # positions seen: attention kernels like whole vectors of masks

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight `[out, in]`."""

    weight: Tensor

    @property
    def bytes(self) -> int:
        """Bytes that a product with it reads."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """The product, in the precision of the weight."""
        return F.linear(x.to(self.weight.dtype), self.weight)


class Part:
    """A function of a plan and of activations, without waits; on a CUDA device replayed as a graph for each shape.

    The first call of a shape computes, and the second records: shapes that are met once are not worth a graph.
    What the function writes lies in memory that stays, and is the same however often it is written.
    """

    def __init__(self, function: Callable[..., Tensor], recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self.met = set[Any]()
        self.graphs: dict[Any, Graph] = {}

    def __call__(self, plan: Numbers, *activations: Tensor, size: int = 0) -> Tensor:
        """`plan` [numbers, ...] is copied; `size`: a number of the host that decides a shape."""
        key = plan.shape, size
        if not self.recorder.records or plan[0].size > GRAPHED:
            return self.function(self.recorder.sent(plan), *activations, size)
        if key in self.graphs:
            return self.graphs[key].replay(plan, activations)
        if key in self.met:
            self.graphs[key] = self.recorder.record(self.function, plan, activations, size)
            return self.graphs[key].replay(plan, activations)
        self.met.add(key)
        return self.function(self.recorder.sent(plan), *activations, size)


@dataclass
class Graph:
    """A recorded function: what it reads stands where it stood."""

    graph: Any
    plan: Tensor
    activations: tuple[Tensor, ...]
    out: Tensor

    def replay(self, plan: Numbers, activations: Sequence[Tensor]) -> Tensor:
        """What the function gives for these."""
        self.plan.copy_(torch.from_numpy(plan).pin_memory(), non_blocking=True)
        for mine, given in zip(self.activations, activations, strict=True):
            mine.copy_(given)
        self.graph.replay()
        # Graphs share their memory: another one that was recorded before this one may write over it.
        return self.out.clone()


class Recorder:
    """Where parts run, and the memory that their graphs share."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.records = device, device.type == "cuda"
        if self.records:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def sent(self, numbers: NDArray[Any]) -> Tensor:
        """Numbers of the host, on the device."""
        return to_device(torch.from_numpy(np.ascontiguousarray(numbers)), self.device)

    def record(self, function: Callable[..., Tensor], plan: Numbers, activations: Sequence[Tensor], size: int) -> Graph:
        """A graph of the function, after a run on the same stream, which allocates what libraries keep."""
        mine, given = self.sent(plan), tuple(x.clone() for x in activations)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function(mine, *given, size)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out = function(mine, *given, size)
        return Graph(graph, mine, given, out)


@dataclass(frozen=True)
class Device:
    """See `base.Backend`: activations are tensors of `dtype` on a device."""

    device: torch.device
    dtype: torch.dtype
    weights: str | None
    """What linear layers are rounded to: "bf16", or None for `dtype`."""
    host: Kernels
    recorder: Recorder = field(repr=False)

    chunk = CHUNK
    repeats = False  # libraries round differently in a batch
    team = None

    @classmethod
    def open(cls, device: torch.device, exact: bool, weights: str | None) -> Device:
        """A device. Raises UsageError where there are no kernels to decide on the host with."""
        dtype = torch.float64 if exact else torch.float32
        return cls(device, dtype, weights, Kernels.open(exact), Recorder(device))

    @property
    def stored(self) -> torch.dtype:
        """What weights and caches are."""
        return torch.bfloat16 if self.weights else self.dtype

    def precise(self) -> Device:
        """See `Backend`."""
        return replace(self, weights=None)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room on the device."""
        with torch.inference_mode(False):  # it is written to in any mode
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def vector(self, weight: Tensor) -> Tensor:
        """See `Backend`."""
        return weight.detach().to(self.dtype)

    def table(self, weight: Tensor) -> Tensor:
        """See `Backend`."""
        return weight.detach()

    def matrix(self, weight: Tensor, *, whole: bool = False) -> Matrix:
        """See `Backend`; no copy of what is in the right precision already."""
        return Matrix(weight.detach() if whole else weight.detach().to(self.stored))

    def embed(self, table: Tensor, ids: Ints) -> Tensor:
        """See `Backend`."""
        return F.embedding(self.recorder.sent(ids), table).to(self.dtype)

    def linear(self, matrix: Matrix, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """See `Backend`. After a norm come logits: they are not rounded."""
        if norm is None:
            return matrix(x).to(self.dtype)
        return F.linear(self.normed(x, norm, eps), matrix.weight.to(self.dtype))

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Backend`."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def instead(self, x: Tensor, where: NDArray[np.bool_], line: Tensor) -> Tensor:
        """See `Backend`."""
        return torch.where(self.recorder.sent(where)[:, None], line, x)

    def entropies(self, logits: Tensor) -> Reals:
        """See `Backend`: one wait."""
        chances = logits.log_softmax(-1)
        return fetched(-(chances.exp() * chances).sum(-1))

    def layers(self, *args: Any, **options: Any) -> Layers:
        """See `Backend`."""
        return Layers(self, *args, **options)

    def pooling(self, model: BLT, kept: list[Tensor], slots: int) -> Pool:
        """See `Backend`."""
        return Pool(self, model, kept, slots)

    def hashed(self, embed: NgramEmbedding, ids: Ints) -> Hashed:
        """See `Backend`."""
        return Hashed(self, embed, ids)

    def patches(self, embed: PatchEmbedding) -> Embedding:
        """See `Backend`."""
        return Embedding(self, embed)

    def stage(self, inner: Inner, rows: int) -> Stage:
        """See `Backend`."""
        return Stage(self, inner, rows)


def bucket(count: int, least: int = 1) -> int:
    """The power of two that so many are filled up to."""
    return max(least, 1 << (count - 1).bit_length())


def filled(index: Ints) -> Ints:
    """Indices filled up to a power of two by the last of them."""
    return np.concatenate([index, index[-1:].repeat(bucket(len(index)) - len(index))])


def grids(row: Ints) -> Iterator[Ints]:
    """New positions as grids `[rows, new]` of their indices, -1 where filled up; rows with one new position apart."""
    begin = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
    count = np.diff(np.append(begin, len(row)))
    for some in (count == 1, count > 1):
        first, longest = begin[some], bucket(int(count[some].max(initial=1)))
        step = max(1, TOGETHER // longest) if longest > 1 else max(1, len(first))
        place = np.arange(longest)
        for at in range(0, len(first), step):
            part = slice(at, at + step)
            found = np.full((bucket(len(first[part])), longest), -1)
            real = place < count[some][part, None]
            found[: len(real)] = np.where(real, first[part, None] + place, -1)
            yield found


@dataclass(frozen=True)
class Cross:
    """The weights of the cross-attention before a block."""

    query_norm: Tensor
    key_norm: Tensor
    query: Matrix
    key_value: Matrix
    out: Matrix

    @classmethod
    def of(cls, device: Device, cross: CrossAttention) -> Cross:
        """Those of a module."""
        query_norm, key_norm = (device.vector(norm.weight) for norm in (cross.query_norm, cross.key_norm))
        query, key_value, out = (device.matrix(part.weight) for part in (cross.query, cross.key_value, cross.out))
        return cls(query_norm, key_norm, query, key_value, out)

    @property
    def bytes(self) -> int:
        """Bytes of its matrices."""
        return self.query.bytes + self.key_value.bytes + self.out.bytes


@dataclass(frozen=True)
class Weights:
    """The weights of a block."""

    attention_norm: Tensor
    qkv: Matrix
    out: Matrix
    feed_forward_norm: Tensor
    gate_up: Matrix
    down: Matrix

    @classmethod
    def of(cls, device: Device, block: Block) -> Weights:
        """Those of a module."""
        attention, wide = block.attention, block.feed_forward
        norms = [device.vector(norm.weight) for norm in (block.attention_norm, block.feed_forward_norm)]
        qkv, out = device.matrix(attention.qkv.weight), device.matrix(attention.out.weight)
        return cls(norms[0], qkv, out, norms[1], device.matrix(wide.gate_up.weight), device.matrix(wide.down.weight))

    @property
    def bytes(self) -> int:
        """Bytes of its matrices."""
        return self.qkv.bytes + self.out.bytes + self.gate_up.bytes + self.down.bytes


class Layers:
    """All blocks of a stack over rows, see `stacks.Layers`."""

    def __init__(
        self,
        device: Device,
        stack: Stack,
        rows: int,
        seen: int,
        *,
        kept: Sequence[int] = (),
        kept_slots: int = 0,
        cross: Sequence[CrossAttention] = (),
        parts: int = 0,
        patches: int = 0,
    ) -> None:
        config = stack.config
        self.device, self.config, self.rows, self.slots = device, config, rows, seen
        frequencies = config.theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
        self.frequencies = device.recorder.sent(frequencies)
        self.blocks: list[Weights] = []
        for block in stack.blocks:
            assert isinstance(block, Block)
            self.blocks.append(Weights.of(device, block))
        self.cross = [Cross.of(device, module) for module in cross]
        self.cross_heads = cross[0].heads if cross else 0
        whole = rows + 1  # the spare one takes what fills up
        ring = (whole * seen, 2, config.heads, config.head_dim)
        self.rings = [device.zeros(*ring, dtype=device.stored) for _ in self.blocks]
        self.kept_layers, self.kept_slots = list(kept), kept_slots
        self.kept = [device.zeros(whole * kept_slots, config.dim) for _ in kept]
        self.parts, self.patches = parts, patches
        held = (whole * patches, len(cross), parts, 2, config.dim) if cross else (0,)
        self.held = device.zeros(*held, dtype=device.stored)
        self.read, self.write = Part(self._read, device.recorder), Part(self._hold, device.recorder)
        self.weight_bytes = sum(w.bytes for w in self.blocks) + sum(c.query.bytes + c.out.bytes for c in self.cross)
        self.cross_bytes = sum(c.key_value.bytes for c in self.cross)
        self.slot_bytes = config.layers * 2 * config.dim * device.stored.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes."""
        return sum(x.nbytes for x in (*self.rings, *self.kept, self.held)) // (self.rows + 1)

    def run(self, x: Tensor, row: Ints, position: Ints, start: Ints, patch: Ints | None = None) -> Tensor:
        """All blocks over new positions `x` [n, dim]. `start`: the first position that each of them sees."""
        first = np.maximum(start, position - (self.config.window or self.slots) + 1)
        found: list[Tensor] = []
        order: list[Ints] = []
        for grid in grids(row):
            index = np.maximum(np.maximum.accumulate(grid, 1), 0)  # what fills a row up repeats its last position
            real = grid >= 0
            mine = np.where(real[:, :1], row[index], self.rows)
            at, since = np.where(mine < self.rows, position[index], 0), np.where(mine < self.rows, first[index], 0)
            spans = int((at[:, -1:] - since).max()) + 1
            into = np.where(real, mine, self.rows)
            read = np.zeros_like(at) if patch is None else mine * self.patches + patch[index] % self.patches
            kept = into * self.kept_slots + at % self.kept_slots if self.kept_slots else read
            plan = np.stack([mine, at, since, into * self.slots + at % self.slots, kept, read])
            whole = len(order) == 0 and index.size == len(row) and bool(real.all())
            mixed = x if whole else x.index_select(0, self.device.recorder.sent(index.ravel()))
            found.append(self.read(plan, mixed, size=bucket(spans, LEAST)))
            if whole:
                return found[0]
            order.append(grid.ravel())
        places = np.concatenate(order)
        back = np.empty(len(row), np.int64)
        back[places[places >= 0]] = np.flatnonzero(places >= 0)
        return torch.cat(found).index_select(0, self.device.recorder.sent(back))

    def _read(self, plan: Tensor, x: Tensor, spans: int) -> Tensor:
        """Over a grid `[rows, new]` of positions, which see the newest `spans` positions of their rows."""
        config, dtype = self.config, self.device.dtype
        rows, new = plan.shape[1:]
        position, first = plan[1], plan[2]
        into, kept = plan[3].flatten(), plan[4].flatten()
        # The positions that a row sees, its newest last, and where they lie.
        seen = position[:, -1:] - torch.arange(spans - 1, -1, -1, device=plan.device)
        slots = (plan[0, :, :1] * self.slots + seen.remainder(self.slots)).flatten()
        hidden = (seen[:, None] < first[..., None]) | (seen[:, None] > position[..., None])
        bias = torch.zeros(hidden.shape, dtype=self.device.stored, device=plan.device)
        bias = bias.masked_fill(hidden, float("-inf"))[:, None]
        angles = position.flatten()[:, None, None, None].double() * self.frequencies
        turn = torch.polar(torch.ones_like(angles), angles).to(
            torch.complex128 if dtype.itemsize == 8 else torch.complex64
        )
        parts = self.held.index_select(0, plan[5].flatten()) if self.cross else None
        for index, block in enumerate(self.blocks):
            if parts is not None:
                x = self._crossed(self.cross[index], x, parts[:, index])
            qkv = block.qkv(self.device.normed(x, block.attention_norm, EPS)).unflatten(-1, (3, config.heads, -1))
            query_key = qkv[:, :2]
            pairs = torch.view_as_complex(query_key.to(dtype).unflatten(-1, (-1, 2)))
            query_key.copy_(torch.view_as_real(pairs * turn).flatten(-2))
            ring = self.rings[index]
            ring.index_copy_(0, into, qkv[:, 1:])
            keys, values = ring.index_select(0, slots).unflatten(0, (rows, spans)).permute(2, 0, 3, 1, 4)
            query = qkv[:, 0].unflatten(0, (rows, new)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
            x = x + block.out(mixed.transpose(1, 2).reshape(x.shape))
            gate, up = block.gate_up(self.device.normed(x, block.feed_forward_norm, EPS)).chunk(2, -1)
            x = x + block.down(F.silu(gate) * up)
            if index in self.kept_layers:
                self.kept[self.kept_layers.index(index)].index_copy_(0, kept, x)
        return x

    def _crossed(self, cross: Cross, x: Tensor, parts: Tensor) -> Tensor:
        """Positions that query the parts `[n, parts, 2, dim]` of one patch each."""
        heads = (self.cross_heads, -1)
        query = cross.query(self.device.normed(x, cross.query_norm, EPS)).unflatten(-1, heads)[:, :, None]
        keys, values = parts.unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, keys, values)
        return 2 * x + cross.out(mixed.flatten(1))  # the published models add the residual twice

    def hold(self, x: Tensor, row: Ints, patch: Ints) -> None:
        """Patches `[n, parts · dim]`, as the cross-attentions read them from now on."""
        at = filled(row * self.patches + patch % self.patches)
        if len(at) > len(x):  # what fills up writes the last patch again
            x = x.index_select(0, self.device.recorder.sent(filled(np.arange(len(x)))))
        self.write(at[None], x)

    def _hold(self, plan: Tensor, x: Tensor, _: int) -> Tensor:
        lines = x.unflatten(-1, (self.parts, -1))
        found = [c.key_value(self.device.normed(lines, c.key_norm, EPS)).unflatten(-1, (2, -1)) for c in self.cross]
        self.held.index_copy_(0, plan[0], torch.stack(found, 1))
        return plan


class Pool:
    """Patches from bytes, see `blt.Pool`."""

    def __init__(self, device: Device, model: BLT, kept: list[Tensor], slots: int) -> None:
        self.device, self.kept, self.slots = device, kept, slots
        self.heads, self.queries = model.config.cross_heads, model.config.queries
        self.split = device.matrix(model.encoder.split.weight)
        modules = [layer for layer in model.encoder.cross if isinstance(layer, CrossAttention)]
        self.cross = [Cross.of(device, module) for module in modules]
        self.bytes = self.split.bytes + sum(cross.bytes for cross in self.cross)
        self.pool = Part(self._pool, device.recorder)

    def patches(self, row: Ints, first: Ints, last: Ints) -> Tensor:
        """Patches `[n, queries · dim]` of the bytes at positions first..last."""
        longest = bucket(int((last - first).max()) + 1, LEAST)
        step = max(1, TOGETHER // longest)
        found: list[Tensor] = []
        for at in range(0, len(row), step):
            index = filled(np.arange(at, min(at + step, len(row))))
            plan = np.stack([row[index], first[index], last[index]])
            found.append(self.pool(plan, size=longest)[: min(step, len(row) - at)])
        return torch.cat(found) if len(found) > 1 else found[0]

    def _pool(self, plan: Tensor, longest: int) -> Tensor:
        """Patches of up to `longest` bytes."""
        row, first, last = plan[:, :, None]
        at = first + torch.arange(longest, device=plan.device)
        slots, beyond = (row * self.slots + at.remainder(self.slots)).flatten(), at > last
        bias = torch.zeros(beyond.shape, dtype=self.device.stored, device=plan.device)
        bias = bias.masked_fill(beyond, float("-inf"))[:, None, None]
        heads = (self.heads, -1)
        queries: Tensor | None = None
        for cross, states in zip(self.cross, self.kept, strict=True):
            bytes = states.index_select(0, slots).unflatten(0, at.shape)
            if queries is None:
                pooled = bytes.masked_fill(beyond[..., None], float("-inf")).amax(1)
                queries = self.device.linear(self.split, pooled).unflatten(-1, (self.queries, -1))
            query = cross.query(self.device.normed(queries, cross.query_norm, EPS)).unflatten(-1, heads)
            pair = cross.key_value(self.device.normed(bytes, cross.key_norm, EPS)).unflatten(-1, (2, *heads))
            keys, values = pair.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=bias)
            queries = 2 * queries + cross.out(mixed.transpose(1, 2).flatten(2))
        assert queries is not None
        return queries.flatten(1)


class Hashed:
    """Hashed n-grams, see `blt.Hashed`: ids of table rows are computed on the host."""

    def __init__(self, device: Device, embed: NgramEmbedding, ids: Ints) -> None:
        assert embed.ngram is not None
        self.device, self.ids, self.rows, self.reach = device, ids, embed.rows, embed.reach
        self.table = device.table(embed.ngram.weight)
        # prime^k of the id k places after the oldest one, for each table; 0 for ids that it does not reach.
        powers = blt.hash_powers(embed)
        tables = [np.pad(line[:size], (embed.reach + 1 - size, 0)) for line in powers for size in embed.sizes]
        self.powers = np.stack(tables)

    def added(self, x: Tensor, new: New) -> Tensor:
        """Bytes `[n, dim]` and the n-grams that end there."""
        at = new.position[:, None] + np.arange(-self.reach, 1)
        ids = np.where(at < 0, PAD, self.ids[new.row[:, None], np.maximum(at, 0)])
        published = (ids + blt.PUBLISHED_OFFSET) % VOCAB
        found = (published[:, None] * self.powers).sum(-1) % self.rows + np.arange(len(self.powers)) * self.rows
        return x + F.embedding(self.device.recorder.sent(found), self.table).sum(1, dtype=x.dtype)


class Embedding(megabyte.Embedding):
    """Patches from ids, see `megabyte.Embedding`."""

    def __init__(self, device: Device, embed: PatchEmbedding) -> None:
        super().__init__(device, embed)
        self.device, self.part = device, Part(self._patches, device.recorder)

    def patches(self, ids: Ints, row: Ints, last: Ints) -> Tensor:
        """The patches `[n, dim]` that end at positions `last` of rows."""
        index = filled(np.arange(len(row)))
        offset = last[index, None] - (self.embed.size + self.reach) + 1 + np.arange(self.embed.size + self.reach)
        real = np.maximum(offset, 0)
        places = self.embed.index(torch.from_numpy(real)).numpy()
        return self.part(np.stack([ids[row[index, None], real], places, offset]))[: len(row)]

    def _patches(self, plan: Tensor, _: int) -> Tensor:
        ids, places, offset = plan
        dtype, size, width = self.device.dtype, self.embed.size, ids.shape[1]
        x = F.embedding(ids, self.byte).to(dtype) + F.embedding(places, self.position).to(dtype)
        for taps, weight in self.filters:
            back = torch.arange(taps - 1, -1, -1, device=x.device)
            at = torch.arange(width, device=x.device)[:, None] - back
            seen = (offset[..., None] >= back) & (at >= 0)
            line = torch.where(seen[..., None], x[:, at.clamp(min=0)], 0.0)
            x = x + F.relu(weight(line.flatten(2)))
        first = offset[:, width - size :] < 0
        pad = torch.cat([self.pad, self.pad[:1]])  # the last place of a patch is never one
        x = torch.where(first[..., None], pad, x[:, width - size :]).flatten(1)
        return x if self.widen is None else self.widen(x).to(dtype)


class Stage(megabyte.Stage):
    """A stack inside patches, see `megabyte.Stage`."""

    def open(self, row: Ints, patch: Ints, above: Tensor) -> None:
        """See `megabyte.Stage`."""
        parts = self.kernels.linear(self.narrow, above) if self.narrow else above
        given = self.kernels.linear(self.condition, parts.unflatten(1, (self.size, self.part)))
        self.given.flatten(0, 1).index_copy_(0, self.sent(row, patch), given)

    def stale(self, row: Ints, patch: Ints) -> None:
        """See `megabyte.Stage`."""
        given = self.given.flatten(0, 1)
        given.index_copy_(0, self.sent(row, patch), given.index_select(0, self.sent(row, patch - 1)))

    def given_at(self, row: Ints, patch: Ints, place: Ints) -> Tensor:
        """See `megabyte.Stage`."""
        at = (row * self.patches + patch % self.patches) * self.size + place
        return self.given.flatten(0, 2).index_select(0, self.kernels.recorder.sent(at))

    def sent(self, row: Ints, patch: Ints) -> Tensor:
        """Where patches of rows lie, on the device."""
        return self.kernels.recorder.sent(row * self.patches + patch % self.patches)
