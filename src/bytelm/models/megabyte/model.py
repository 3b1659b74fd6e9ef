"""MEGABYTE (Yu et al. 2023, arXiv 2305.07185): fixed patches, a global Transformer over them, a local one inside each.

    ids        BOS a b c | d e f g | h          patches of 4; BOS where the paper has its pads
    global     pad BOS   | a b c d | e f g h    the ids up to the start of the patch                           (1-3)
               g0        | g1      | g2
    local      ^ a b c   | ^ e f g | ^          "^" is the local pad; each cell adds its slice of g            (4-5)
    logits     a b c d   | e f g h | i                                                                         (6)

The id that ends a patch starts the next one: the global model has read it by then, and the local one restarts. So the
first byte of a patch is predicted from everything before it, as in the paper, and there is one global step per patch,
when it is complete. Three and more stages are nested: the middle stage is over the sub-patches of one patch.

Attention, norms and feed-forward layers are those of `nn` (rotary, RMSNorm, SwiGLU); see docs/decisions/0005.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bytelm.errors import ConfigError
from bytelm.interfaces.model import ByteModel, LookupTable, Stage
from bytelm.models.megabyte.embedding import PatchEmbedding, Recent
from bytelm.models.megabyte.grid import Grid
from bytelm.models.megabyte.inner import Inner
from bytelm.models.megabyte.line import Line, LineState, line_problems
from bytelm.nn.attention import Cache, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import product
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.layout import Rows, at_end, fronted, since
from bytelm.transfer import to_device
from bytelm.units import BOS, PAD, VOCAB

PIECE = 1 << 23  # positions × width × layers of an inner stage that are computed at a time to save memory
WIDE = 1 << 28  # the same on a device without gradients: smaller pieces would leave most of it idle


@dataclass(frozen=True)
class Config:
    """Shape of a MEGABYTE; tuples have one entry per stage, the global one first.

    `sizes`: positions of the next stage per patch of each stage (the paper's P; the last one counts bytes). `reach`:
    cross-patch attention, the last keys and values of the patch before that inner stages see (the paper's r).
    `filters`: causal convolutions over the global stage's byte vectors (the paper's 3, 5, 7). `positions`: rows of the
    learned E_pos, one per byte of the longest document; "none" for one per place in the patch, without a limit.

    Beyond the paper (docs/decisions/0022): with `local_window` the byte stage does not restart in each patch, but sees
    that many bytes, its own included, across patches (`line.py`); "none" for the paper's. `ngram_sizes`: hashed
    n-grams, a table of `ngram_rows` rows for each size, are then added to its byte vectors; `ngram_output`: rows are
    twice as wide, and their second halves are added before its norm.
    """

    patched: ClassVar[bool] = False  # patches are fixed: there is no scheme to choose

    sizes: tuple[int, ...] = (8,)
    dims: tuple[int, ...] = (384, 192)
    layers: tuple[int, ...] = (6, 3)
    heads: tuple[int, ...] = (6, 3)
    reach: int = 0
    filters: tuple[int, ...] = ()
    positions: int | None = None
    theta: float = 10_000.0
    ffn_multiple: int = 64
    local_window: int | None = None
    ngram_sizes: tuple[int, ...] = ()
    ngram_rows: int = 8192
    ngram_output: bool = False

    def __post_init__(self) -> None:
        problems: list[str] = []
        if len({len(self.dims), len(self.layers), len(self.heads), len(self.sizes) + 1}) > 1 or not self.sizes:
            problems.append(
                f"model: {len(self.dims)} dims, {len(self.layers)} layers and {len(self.heads)} heads for "
                f"{len(self.sizes)} sizes: give one each per stage, and one size less"
            )
        for name, least in (("sizes", 2), ("dims", 1), ("heads", 1), ("layers", 0), ("filters", 1)):
            if any(value < least for value in getattr(self, name)):
                problems.append(f"model.{name} = {list(getattr(self, name))}: each must be at least {least}")
        if self.positions is not None and self.positions < 1:
            problems.append(f'model.positions = {self.positions}: must be at least 1, or "none"')
        problems += line_problems(self)
        if not problems and not 0 <= self.reach <= min(self.sizes):
            problems.append(f"model.reach = {self.reach}: must be from 0 to the smallest of sizes, {min(self.sizes)}")
        if not problems:
            stages = (f"model: stage {level} of" for level in range(len(self.dims)))
            problems += [p for level, name in enumerate(stages) for p in self.stack(level).problems(name)]
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes for the invariant tests, together covering every path of this file."""
        two = cls(sizes=(4,), dims=(32, 16), layers=(2, 2), heads=(2, 2), ffn_multiple=16)
        tables = replace(two, local_window=6, ngram_sizes=(3, 5), ngram_rows=101, ngram_output=True)
        return {
            "two stages": two,
            "cross-patch attention, convolutions": replace(two, reach=3, filters=(3, 5, 7)),
            "three stages": replace(two, sizes=(3, 4), dims=(24, 16, 16), layers=(1, 2, 1), heads=(2, 2, 2), reach=2),
            "projected, learned positions": replace(two, sizes=(6,), dims=(32, 16), reach=6, positions=256),
            "across patches, n-grams": replace(tables, dims=(30, 16), heads=(3, 2)),
            "across patches, three stages": replace(
                two, sizes=(3, 4), dims=(24, 16, 16), layers=(1, 1, 2), heads=(2, 2, 2), reach=2, local_window=5
            ),
        }

    def unit(self, level: int) -> int:
        """Bytes per position of a stage."""
        return math.prod(self.sizes[level:])

    @property
    def patch(self) -> int:
        """Bytes in a patch of the global stage."""
        return self.unit(0)

    def stack(self, level: int) -> StackConfig:
        """The shape of the Transformer of a stage."""
        dim, heads = self.dims[level], self.heads[level]
        window = self.local_window if level == len(self.sizes) else None
        return StackConfig(self.layers[level], dim, heads, window, self.theta, self.ffn_multiple)

    def build(self) -> Megabyte:
        """The model, parameters uninitialised."""
        return Megabyte(self)


@dataclass(frozen=True)
class MegabyteState:
    """The state of rows; only the global caches grow, by one position per patch."""

    read: Int[Tensor, " batch"]
    """Ids read."""
    offset: Int[Tensor, " batch"]
    """The offset of the newest of them in its document."""
    recent: tuple[Recent, ...]
    """The bytes so far of the next patches and sub-patches."""
    patches: RowPositions
    latents: tuple[Float[Tensor, "batch _"], ...]
    """The newest output of each stage but the last: the conditioning of the present patch."""
    caches: tuple[tuple[Cache, ...], ...]
    line: LineState | None
    """Of the byte stage, where it is one across patches."""


class Global(nn.Module):
    """The Transformer over patches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stack = Stack(config.stack(0))
        self.norm = RMSNorm(config.dims[0])


class Megabyte(ByteModel):
    """Patch embeddings, a global Transformer, and stages inside its patches down to the bytes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_sizes = config.sizes
        levels = range(len(config.sizes))
        self.embed = cast("Sequence[PatchEmbedding]", nn.ModuleList(self.embedding(level) for level in levels))
        self.outer = Global(config)
        self.line = None if config.local_window is None else Line(config)
        inside = levels if self.line is None else levels[:-1]
        self.inner = cast("Sequence[Inner]", nn.ModuleList(Inner(config, level + 1) for level in inside))
        # The local pads of middle stages; that of the bytes is the row of BOS in their table.
        self.pads = cast("Sequence[nn.Embedding]", nn.ModuleList(nn.Embedding(1, dim) for dim in config.dims[1:-1]))
        if self.line is None:
            self.byte = nn.Embedding(VOCAB, config.dims[-1])

    @property
    def table(self) -> nn.Embedding:
        """E_local, tied to the output matrix."""
        return self.byte if self.line is None else self.line.embed.byte

    def embedding(self, level: int) -> PatchEmbedding:
        """The patch embedding of a stage; only the global stage has convolutions."""
        config, unit = self.config, self.config.unit(level)
        dim = config.dims[level]
        filters = config.filters if level == 0 else ()
        return PatchEmbedding(dim, unit, -(-dim // unit), filters, config.positions if level == 0 else None)

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`."""
        init_weights(self.outer, max(1, self.config.layers[0]), seed)
        if self.line is None:
            init_weights(self.byte, 1, seed + 1)
        else:
            self.line.init_weights(seed + 1)
        for index, part in enumerate((*self.embed, *self.pads)):
            init_weights(part, 1, seed + 2 + index)
        for index, inner in enumerate(self.inner):
            inner.init_weights(seed + 100 + index)

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`, for one document; `patches` is ignored, as patches are fixed."""
        config = self.config
        counts = [-(-ids // config.unit(level)) for level in range(len(config.dims))]
        found = config.stack(0).flops(counts[0])
        found += sum(embed.flops(ids, count) for embed, count in zip(self.embed, counts, strict=False))
        found += sum(inner.flops(count) for inner, count in zip(self.inner, counts[1:], strict=False))
        if self.line is not None:
            return found + self.line.flops(ids, counts[-2])
        size = config.sizes[-1]
        cells = ids if ids <= size else -(-ids // size) * size
        return found + 2 * cells * config.dims[-1] * VOCAB

    def set_dropout(self, chance: float) -> None:
        """See `ByteModel`; of n-grams too."""
        super().set_dropout(chance)
        if self.line is not None:
            self.line.embed.dropout = chance

    def lookup_tables(self) -> list[LookupTable]:
        """See `ByteModel`."""
        return [] if self.line is None or self.line.embed.ngram is None else [self.line.embed]

    def output_weights(self) -> list[nn.Parameter]:
        """See `ByteModel`; they embed bytes too."""
        return list(self.table.parameters())

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`. In addition to the stacks: byte vectors, their patches, slices of the stage above."""
        config, found = self.config, list[Stage]()
        for level, part in enumerate([self.outer, *self.inner]):
            dim, name = config.dims[level], "local" if level else "global"
            piece = PIECE // (dim * max(1, config.layers[level])) if level else None
            apart = config.sizes[level - 1] if level else None
            found.append(Stage(name, part.stack, -(-ids // config.unit(level)), 12 * dim, piece, apart=apart))
        return found if self.line is None else [*found, self.line.stage(ids)]

    @property
    def device(self) -> torch.device:
        """See `ByteModel`."""
        return self.table.weight.device

    def initial_state(self, batch: int) -> MegabyteState:
        """See `ByteModel`."""
        zero = torch.zeros(batch, dtype=torch.long)
        latents = tuple(torch.zeros(batch, dim, device=self.device) for dim in self.config.dims[:-1])
        return MegabyteState(
            read=zero,
            offset=zero,
            recent=tuple(embed.initial_state(batch, self.device) for embed in self.embed),
            patches=RowPositions.zero(batch),
            latents=latents,
            caches=(
                self.outer.stack.initial_state(batch, self.device),
                *(inner.initial_state(batch, self.device) for inner in self.inner),
            ),
            line=None if self.line is None else self.line.initial_state(batch, self.device),
        )

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: MegabyteState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], MegabyteState | None]:
        """See `ByteModel`; `boundaries` are ignored, as patches are fixed."""
        if not ids.shape[1]:
            return self.table.weight.new_zeros(*ids.shape, VOCAB), state
        keep = state is not None
        state = state if state is not None else self.initial_state(len(ids))
        rows = Rows.of(ids)
        offset = since(rows.starts(state.read), state.offset).masked_fill(~rows.real, 0)
        slots, counts = self.openings(offset, rows, 0)
        x, recent = self.embed[0](rows.ids, offset, slots, rows.lengths, state.recent[0])
        above, where, outer = self.advance(x, counts, offset.gather(1, slots) == 0, state, keep)
        recents, latents, caches = [recent], [newest(above, counts)], [outer]
        for level in range(1, len(self.config.sizes)):
            slots, counts = self.openings(offset, rows, level)
            x, recent = self.embed[level](rows.ids, offset, slots, rows.lengths, state.recent[level])
            before = above
            above, cache = state.latents[level][:, None], state.caches[level]
            if slots.shape[1]:
                opens = offset.gather(1, slots)
                x = torch.where(
                    to_device(opens % self.config.unit(level - 1) == 0, x)[..., None], self.pads[level - 1].weight, x
                )
                grid = self.grid(level, opens, counts).carried(x.device)
                x, after = self.inside(level, grid.spread(x, 0), grid, before, cache if keep else None)
                cache = after or ()
                above = torch.cat([above.to(x.dtype), grid.collect(x.flatten(1, 2))], 1)
            recents, latents, caches = [*recents, recent], [*latents, newest(above, counts)], [*caches, cache]
        if self.line is None or state.line is None:
            logits, cache = self.bytes(rows, offset, above, state.caches[-1] if keep else None)
            line, caches = None, [*caches, cache or ()]
        else:
            logits, line = self.line(rows, state.read, offset, above, state.line, keep)
        logits = rows.restore(logits)
        if not keep:
            return logits, None
        after, read = at_end(offset, rows.lengths, state.offset), state.read + rows.lengths
        return logits, MegabyteState(read, after, tuple(recents), where, tuple(latents), tuple(caches), line)

    def bytes(
        self, rows: Rows, offset: Int[Tensor, "batch new"], above: Tensor, caches: tuple[Cache, ...] | None
    ) -> tuple[Float[Tensor, "batch new vocab"], tuple[Cache, ...] | None]:
        """The byte stage inside patches."""
        level = len(self.config.sizes)
        grid = self.grid(level, offset, rows.lengths)
        symbols = torch.where(offset % self.config.sizes[-1] == 0, BOS, rows.ids)
        cells, grid = to_device(grid.spread(symbols, PAD), self.device), grid.carried(self.device)
        logits, caches = self.inside(level, cells, grid, above, caches)
        return grid.collect(logits.flatten(1, 2)), caches

    def openings(
        self, offset: Int[Tensor, "batch new"], rows: Rows, level: int
    ) -> tuple[Int[Tensor, "batch opened"], Int[Tensor, " batch"]]:
        """The slots of new ids that start a position of a stage, left-aligned, and their number per row."""
        return fronted((offset % self.config.unit(level) == 0) & rows.real)

    def grid(self, level: int, offset: Int[Tensor, "batch new"], counts: Int[Tensor, " batch"]) -> Grid:
        """The grid of new positions of an inner stage, from the offsets at which they start."""
        place = offset // self.config.unit(level) % self.config.sizes[level - 1]
        return Grid.of(place, offset >= self.config.unit(level - 1), counts, self.config.sizes[level - 1])

    def advance(
        self, x: Tensor, counts: Tensor, starts: Tensor, state: MegabyteState, keep: bool
    ) -> tuple[Float[Tensor, "batch known dim"], RowPositions, tuple[Cache, ...]]:
        """One global step per new patch. Returns the newest output so far, then those of the steps."""
        latent, caches = state.latents[0][:, None], state.caches[0]
        if not x.shape[1]:
            return latent, state.patches, caches
        x, where, after = self.outer.stack.advance(x, counts, starts, state.patches, caches if keep else None)
        x = self.outer.norm(x)
        return torch.cat([latent.to(x.dtype), x], 1), where, after or ()

    def inside(
        self, level: int, cells: Tensor, grid: Grid, above: Tensor, caches: tuple[Cache, ...] | None
    ) -> tuple[Tensor, tuple[Cache, ...] | None]:
        """An inner stage over its grid: outputs `[batch, patches, width, ...]`, logits in the byte stage.

        To save memory it processes patches in pieces, recomputed in the backward pass: saved activations then grow with
        patches instead of bytes.
        """
        inner = self.inner[level - 1]
        lines = torch.arange(grid.patches, device=above.device) + grid.fresh.long()[:, None]
        above = above[torch.arange(len(above), device=above.device)[:, None], lines.clamp(max=above.shape[1] - 1)]
        config = inner.stack.config
        spared = not torch.is_grad_enabled() or inner.stack.recompute
        piece = WIDE if above.device.type != "cpu" and not torch.is_grad_enabled() else PIECE
        step = max(1, piece // (len(cells) * grid.size * config.dim * max(1, config.layers)))
        if not spared or grid.patches <= step:
            return self.piece(inner, cells, grid, above, caches)
        found: list[Tensor] = []
        ends: tuple[Cache, ...] = ()
        for first in range(0, grid.patches, step):
            stop = min(first + step, grid.patches)
            part = inner, cells[:, first:stop], grid.lines(first, stop), above[:, first:stop]
            if caches is not None:
                out, caches = self.piece(*part, caches)
            elif torch.is_grad_enabled():
                draws = inner.stack.draws
                out, ends = checkpoint(self.piece_after, *part, ends, use_reentrant=False, preserve_rng_state=draws)
            else:
                out, ends = self.piece_after(*part, ends)
            found.append(out)
        return torch.cat(found, 1), caches

    def piece_after(
        self, inner: Inner, cells: Tensor, grid: Grid, above: Tensor, ends: tuple[Cache, ...]
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """A piece after another, without a state: only the keys and values that a patch sees are passed on."""
        if not inner.reach:
            return self.piece(inner, cells, grid, above, None)[0], ()
        caches = inner.initial_state(len(cells), cells.device)
        if ends:
            caches = tuple(Cache(*(F.pad(x, (0, 0, 0, 0, grid.size, 0)) for x in (e.keys, e.values))) for e in ends)
        out, after = self.piece(inner, cells, grid, above, caches)
        return out, tuple(Cache(c.keys[:, -inner.reach :], c.values[:, -inner.reach :]) for c in after or ())

    def piece(
        self, inner: Inner, cells: Tensor, grid: Grid, above: Tensor, caches: tuple[Cache, ...] | None
    ) -> tuple[Tensor, tuple[Cache, ...] | None]:
        """A piece of an inner stage; in the byte stage from ids to logits."""
        if cells.is_floating_point():
            return inner(cells, grid, above, caches)
        x, caches = inner(F.embedding(cells, self.table.weight), grid, above, caches)
        return product(x, self.table.weight), caches


def newest(known: Float[Tensor, "batch known dim"], counts: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
    """Each row's last output: `counts` new ones follow the one before."""
    return known[torch.arange(len(known), device=known.device), to_device(counts, known)]
