"""MEGABYTE as the public implementations have it (MEGABYTE-pytorch 0.3.6, MBLM 0.4.2), for their checkpoints.

    ids        BOS a b c d e f g h          patches of 4
    global         ^ . . A . . . B          one position per complete patch: A = abcd; before the first, "^"
               g0 ───────g1──────g2         g0 from "^" only, g1 also from A
    local          ^abcd   ^efgh            "^" before each patch; a adds the first part of g0, b the second, ...
    logits     a b c d e f g h i            from "^", then from each byte: e in the patch whose last byte is d

Differences to `models.megabyte`, which is the paper's: the last byte of a patch predicts the first of the next, which
is therefore predicted from a global output that has not read the patch before; one matrix maps an output to vectors for
all places inside; every stage has a learned start token "^"; a patch is its byte vectors, normed, projected and normed
again; blocks have token shift (`shift`); the output matrix is not tied.

BOS is "^": it starts a document, and the prediction at the last stage's "^" scores the first byte. The outputs at the
other stages' "^" are known when a row starts, so that a row which starts within a document has its first byte read as
the first of a document. A middle stage does not read the last sub-patch of each patch: nothing is predicted from it.
Attention inside patches is windowed attention in which each patch is a document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.errors import ConfigError, UsageError
from bytelm.interfaces.model import ByteModel, Stage
from bytelm.models.megabyte_pytorch.shift import EPS, ShiftCache, ShiftConfig, ShiftStack
from bytelm.nn.attention import RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.norm import RMSNorm
from bytelm.nn.rope import rotate, rotation
from bytelm.patching.layout import Rows, at_end, fronted, since, tail
from bytelm.transfer import to_device
from bytelm.units import BOS, PAD, VOCAB

THETA = 10_000.0  # fixed in both implementations
Positions = Literal["none", "learned", "rotary"]


@dataclass(frozen=True)
class Config:
    """Shape of such a MEGABYTE; tuples have one entry per stage, the global one first, and `sizes` one less.

    `sizes`: positions of the next stage per patch of each stage (their max_seq_len without its first entry). `ffn`:
    feed-forward widths as multiples; `ffn_dims`: any others. `rotary`: whether attention has rotary positions.
    `positions`: added to the patches or bytes of a stage; "rotary" rotates their vectors instead (MBLM's "rope").
    `patches`: rows of the global stage's learned positions, which limit a document; "none" if it has none.
    `multi_query`: one head of keys and values for all queries, as before 0.3.0 of MEGABYTE-pytorch.
    """

    patched: ClassVar[bool] = False  # patches are fixed: there is no scheme to choose

    sizes: tuple[int, ...] = (4,)
    dims: tuple[int, ...] = (512, 256)
    layers: tuple[int, ...] = (6, 4)
    heads: tuple[int, ...] = (8, 8)
    head_dims: tuple[int, ...] = (64, 64)
    ffn: tuple[int, ...] = (4, 4)
    rotary: tuple[bool, ...] = (False, False)
    positions: tuple[Positions, ...] = ("none", "none")
    patches: int | None = None
    multi_query: bool = False
    ffn_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems: list[str] = []
        each = ("dims", "layers", "heads", "head_dims", "ffn", "ffn_dims", "rotary", "positions")
        counts = {name: len(getattr(self, name)) for name in each if name != "ffn_dims" or self.ffn_dims}
        if set(counts.values()) != {len(self.sizes) + 1} or not self.sizes:
            given = ", ".join(f"{count} {name}" for name, count in counts.items())
            problems.append(f"model: {given} for {len(self.sizes)} sizes: give one each per stage, and one size less")
        least = {"sizes": 2, "dims": 2, "layers": 0, "heads": 1, "head_dims": 1, "ffn": 1, "ffn_dims": 1}
        for name, bound in least.items():
            if any(value < bound for value in getattr(self, name)):
                problems.append(f"model.{name} = {list(getattr(self, name))}: each must be at least {bound}")
        if not problems:
            for stage, dim in enumerate(self.dims):
                if self.rotary[stage] and self.head_dims[stage] % 2:
                    problems.append(f"model.head_dims[{stage}] = {self.head_dims[stage]}: rotary needs an even width")
                if self.positions[stage] == "rotary" and dim % 2:
                    problems.append(f"model.dims[{stage}] = {dim}: rotary positions need an even width")
            learned = self.positions[0] == "learned"
            if learned != (self.patches is not None) or (self.patches or 1) < 1:
                problems.append(
                    f"model.patches = {self.patches or 'none'}: give at least 1 where positions[0] is "
                    f'"learned", and "none" elsewhere; it is "{self.positions[0]}"'
                )
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes for the invariant tests, together covering every path of this file."""
        three = cls((3, 4), (24, 16, 16), (1, 2, 1), (2, 2, 2), (8, 8, 4), (2, 2, 2), (True,) * 3, ("none",) * 3)
        return {
            "two stages, learned positions": cls(
                *((4,), (32, 16), (2, 2), (2, 2), (8, 4), (2, 3)), positions=("learned", "learned"), patches=800
            ),
            "three stages, rotary, one head of keys": replace(three, multi_query=True, ffn_dims=(32, 48, 64)),
            "three stages, positions of every kind": replace(
                three, sizes=(2, 3), rotary=(True, False, True), positions=("rotary", "learned", "none")
            ),
        }

    def unit(self, level: int) -> int:
        """Bytes per position of a stage."""
        return math.prod(self.sizes[level:])

    @property
    def patch(self) -> int:
        """Bytes in a patch of the global stage."""
        return self.unit(0)

    def places(self, level: int) -> int | None:
        """Positions of a stage between start tokens; None for any number."""
        if level == 0:
            return None
        return self.sizes[level - 1] - (level < len(self.sizes))  # a middle stage does not read the last one

    def positions_of(self, level: int, ids: int) -> tuple[int, int]:
        """For a document of `ids` ids: the patches, or ids, that a stage reads, and its start tokens."""
        whole = (ids - 1) // self.unit(level)
        if level == 0:
            return whole, min(1, whole)
        size = self.sizes[level - 1]
        return whole - whole // size if level < len(self.sizes) else ids, -(-whole // size)

    def stack(self, level: int) -> ShiftConfig:
        """The shape of the Transformer of a stage."""
        places, heads = self.places(level), self.heads[level]
        return ShiftConfig(
            layers=self.layers[level],
            dim=self.dims[level],
            heads=heads,
            attention_window=None if places is None else places + 1,
            theta=THETA,
            ffn_dim=self.ffn_dims[level] if self.ffn_dims else self.ffn[level] * self.dims[level],
            inner=heads * self.head_dims[level],
            rotary=self.rotary[level],
            multi_query=self.multi_query,
        )

    def build(self) -> MegabytePyTorch:
        """The model, parameters uninitialised."""
        return MegabytePyTorch(self)


@dataclass(frozen=True)
class MegabytePyTorchState:
    """The state of rows; only the global caches grow, by one position per patch."""

    offset: Int[Tensor, " batch"]
    """Bytes read of the document."""
    recent: Int[Tensor, "batch reach"]
    """The newest ids, for the next patches."""
    where: tuple[RowPositions, ...]
    caches: tuple[tuple[ShiftCache, ...], ...]
    known: tuple[Float[Tensor, "batch 2 _ _"], ...]
    """Of each stage but the last, in parts: the output after its start token only, and the newest output."""


class Level(nn.Module):
    """A stage: its tables, its Transformer, and the projection of its outputs for the stage inside."""

    def __init__(self, config: Config, level: int) -> None:
        super().__init__()
        self.unit = config.unit(level)
        self.size = config.sizes[level - 1] if level else None
        self.turned = config.positions[level] == "rotary"
        dim = config.dims[level]
        self.byte = nn.Embedding(VOCAB, config.dims[-1])
        rows = self.size or config.patches
        self.position = nn.Embedding(rows, dim) if rows and config.positions[level] == "learned" else None
        self.stack = ShiftStack(config.stack(level))
        self.norm = RMSNorm(dim, EPS)

    def start(self) -> Float[Tensor, "1 1 dim"]:
        """The start token; in the last stage the row of BOS."""
        return self.byte.weight[None, BOS : BOS + 1]

    def place(self, offset: Int[Tensor, "*some"]) -> Int[Tensor, "*some"]:
        """The place after the start token, from 1, of the position that ends with byte `offset`, from 1."""
        index = (offset - 1).clamp(min=0) // self.unit
        return 1 + (index if self.size is None else index % self.size)

    def placed(
        self, x: Float[Tensor, "batch count dim"], place: Int[Tensor, "batch count"]
    ) -> Float[Tensor, "batch count dim"]:
        """Vectors of bytes or patches with positions added."""
        if self.position is not None:
            return x + F.embedding(to_device(place - 1, x), self.position.weight)
        if self.turned:
            return rotate(x[:, :, None], rotation(to_device(place - 1, x), x.shape[-1], THETA))[:, :, 0]
        return x

    def forward(
        self,
        x: Float[Tensor, "batch count dim"],
        place: Int[Tensor, "batch count"],
        counts: Int[Tensor, " batch"],
        where: RowPositions,
        caches: tuple[ShiftCache, ...] | None,
    ) -> tuple[Float[Tensor, "batch count dim"], RowPositions, tuple[ShiftCache, ...]]:
        """Outputs at the first `counts` new positions (one or more in some row), start tokens added before place 1."""
        slots = torch.arange(x.shape[1])
        real = slots < counts[:, None]
        opens = real & (place == 1)
        lengths = counts + opens.sum(1)
        width = int(lengths.max())
        at = torch.where(real, slots + opens.long().cumsum(1), width)
        index = to_device(at, x)[..., None].expand_as(x)
        start = self.start().expand(len(x), width + 1, -1)
        line = start.scatter(1, index, x.to(start.dtype))[:, :width]
        starts = torch.zeros(len(x), width + 1, dtype=torch.bool)
        starts = starts.scatter(1, torch.where(opens, at - 1, width), True)
        starts = starts.scatter(1, torch.where(real & (place == 0), at, width), True)[:, :width]
        line, where, after = self.stack.advance(line, lengths, starts, where, caches)
        found = line.gather(1, index.clamp(max=width - 1))
        return self.norm(found), where, cast("tuple[ShiftCache, ...]", after or ())


class Outer(Level):
    """A stage of patches: the global one, or a middle one."""

    def __init__(self, config: Config, level: int) -> None:
        super().__init__(config, level)
        dim, wide, below = config.dims[level], self.unit * config.dims[-1], config.dims[level + 1]
        self.pad = nn.Embedding(1, dim)
        self.widen = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, dim), nn.LayerNorm(dim))
        self.parts = nn.Linear(dim, config.sizes[level] * below)
        self.below = below

    def start(self) -> Float[Tensor, "1 1 dim"]:
        """The start token."""
        return F.embedding(torch.zeros(1, 1, dtype=torch.long, device=self.pad.weight.device), self.pad.weight)

    def flops(self, positions: int) -> int:
        """FLOPs of embedding so many positions and of projecting their outputs, start token included."""
        linear = cast("nn.Linear", self.widen[1])
        return 2 * positions * linear.weight.numel() + 2 * (1 + positions) * self.parts.weight.numel()

    def ends(self, offset: Int[Tensor, "batch new"]) -> Bool[Tensor, "batch new"]:
        """The bytes at which a patch ends that the stage reads; `offset` is 0 for specials."""
        whole = (offset > 0) & (offset % self.unit == 0)
        return whole if self.size is None else whole & (self.place(offset) < self.size)

    def embed(
        self, line: Int[Tensor, "batch slots"], slots: Int[Tensor, "batch count"]
    ) -> Float[Tensor, "batch count dim"]:
        """The patches that end at `slots` of `line`."""
        ids = line[torch.arange(len(line))[:, None, None], slots[..., None] + torch.arange(1 - self.unit, 1)]
        return self.widen(self.byte(to_device(ids, self.byte.weight)).flatten(2))

    def alone(self, batch: int) -> Float[Tensor, "batch 1 places below"]:
        """The conditioning of the stage inside after the start token only."""
        view = self.stack.view(torch.tensor([1]), torch.tensor([[True]]), RowPositions.zero(1), None)
        x, _ = self.stack(self.start(), view, None)
        return self.shared(self.norm(x)).expand(batch, -1, -1, -1)

    def shared(self, x: Float[Tensor, "batch count dim"]) -> Float[Tensor, "batch count places below"]:
        """Outputs as the conditioning of each place of the stage inside."""
        return self.parts(x).unflatten(-1, (-1, self.below))


class MegabytePyTorch(ByteModel):
    """A global Transformer over patches, and stages inside its patches down to the bytes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_sizes = config.sizes
        last = len(config.sizes)
        self.outer = cast("Sequence[Outer]", nn.ModuleList(Outer(config, level) for level in range(last)))
        self.inner = Level(config, last)
        self.head = nn.Linear(config.dims[-1], VOCAB)

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`."""
        for level, part in enumerate((*self.outer, self.inner)):
            init_weights(part, max(1, self.config.layers[level]), seed + level)
        init_weights(self.head, 1, seed + 100)

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`, for one document; `patches` is ignored, as patches are fixed."""
        config = self.config
        found = 2 * ids * self.head.weight.numel()
        for level in range(len(config.dims)):
            own, starts = config.positions_of(level, ids)
            found += config.stack(level).flops(own + starts)
            if level < len(config.sizes):
                found += self.outer[level].flops(own) + config.stack(level).flops(1)
        return found

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`. In addition to the stacks: vectors of bytes, normed, and of patches; conditioning."""
        config, found = self.config, list[Stage]()
        for level, part in enumerate((*self.outer, self.inner)):
            beside = 12 * config.dims[level]
            if isinstance(part, Outer):
                beside += 6 * part.unit * config.dims[-1] + 8 * config.dims[level] + 2 * part.parts.out_features
            name, positions = "local" if level else "global", sum(config.positions_of(level, ids))
            found.append(Stage(name, part.stack, positions, beside, apart=config.places(level)))
        return found

    def units(self) -> list[nn.Module]:
        """See `ByteModel`: how often the stages over patches are entered depends on the ids."""
        return list(self.inner.stack.blocks)

    def initial_state(self, batch: int) -> MegabytePyTorchState:
        """See `ByteModel`."""
        parts = (*self.outer, self.inner)
        return MegabytePyTorchState(
            offset=torch.zeros(batch, dtype=torch.long),
            recent=torch.full((batch, self.config.patch - 1), PAD),
            where=tuple(RowPositions.zero(batch) for _ in parts),
            caches=tuple(part.stack.initial_state(batch, self.device) for part in parts),
            known=tuple(part.alone(batch).repeat(1, 2, 1, 1) for part in self.outer),
        )

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: MegabytePyTorchState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], MegabytePyTorchState | None]:
        """See `ByteModel`; `boundaries` are ignored. Raises UsageError for a document longer than learned positions."""
        rows = Rows.of(ids)
        if not bool(rows.real.any()):
            return self.head.weight.new_zeros(*ids.shape, VOCAB), state
        keep = state is not None
        state = state if state is not None else self.initial_state(len(ids))
        offset = since(rows.ids == BOS, state.offset).masked_fill(~rows.real, 0)
        self.check(offset)
        line = torch.cat([state.recent, rows.ids], 1)
        above: Above | None = None
        wheres, caches, knowns = list[RowPositions](), list[tuple[ShiftCache, ...]](), list[Tensor]()
        for level, part in enumerate(self.outer):
            ends = part.ends(offset)
            slots, counts = fronted(ends)
            known, where, cache = state.known[level], state.where[level], state.caches[level]
            if slots.shape[1]:
                place = part.place(offset.gather(1, slots))
                x = part.placed(part.embed(line, slots + self.config.patch - 1), place)
                x = x if above is None else x + above.at(slots, place)
                x, where, cache = part(x, place, counts, where, cache if keep else None)
                known = torch.cat([known, part.shared(x).to(known.dtype)], 1)
            above = Above(known, torch.where(part.place(offset) == 1, 0, 1 + ends.cumsum(1) - ends.long()))
            newest = known[torch.arange(len(ids), device=known.device), to_device(1 + counts, known)]
            wheres, caches = [*wheres, where], [*caches, cache]
            knowns.append(torch.stack([known[:, 0], newest], 1))
        assert above is not None
        x, place = self.inner.byte(to_device(rows.ids, self.device)), self.inner.place(offset)
        conditioning = above.at(torch.arange(ids.shape[1]).expand_as(place), place)
        placed = self.inner.placed(x, place) + conditioning
        x = torch.where(to_device(offset > 0, x)[..., None], placed, x)  # BOS's row is the start token
        place = place.masked_fill(offset == 0, 0)
        x, where, cache = self.inner(x, place, rows.lengths, state.where[-1], state.caches[-1] if keep else None)
        logits = rows.restore(self.head(x).float())
        if not keep:
            return logits, None
        recent = tail(line, rows.lengths + self.config.patch - 1, self.config.patch - 1)
        after = at_end(offset, rows.lengths, state.offset)
        return logits, MegabytePyTorchState(after, recent, (*wheres, where), (*caches, cache), tuple(knowns))

    def check(self, offset: Int[Tensor, "batch new"]) -> None:
        """Raises UsageError for a document longer than the global stage's learned positions."""
        limit = math.inf if self.config.patches is None else self.config.patches * self.config.patch
        if (longest := int(offset.max())) > limit:
            raise UsageError(
                f"a document of {longest} bytes is longer than the {limit} for which there are learned positions "
                f"(model.patches = {self.config.patches}, of {self.config.patch} bytes each): "
                "read it in shorter windows"
            )


@dataclass(frozen=True)
class Above:
    """The conditioning of a stage by the one outside it."""

    known: Float[Tensor, "batch outputs places dim"]
    """By place: the output after the start token only, the newest so far, the new ones."""
    output: Int[Tensor, "batch new"]
    """The one from which each new byte is predicted."""

    def at(
        self, slots: Int[Tensor, "batch count"], place: Int[Tensor, "batch count"]
    ) -> Float[Tensor, "batch count dim"]:
        """The conditioning of positions that end at new bytes `slots`, at `place` after their start tokens."""
        rows, output = torch.arange(len(slots))[:, None], self.output.gather(1, slots)
        return self.known[tuple(to_device(x, self.known) for x in (rows, output, place - 1))]
