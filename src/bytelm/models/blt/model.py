"""The Byte Latent Transformer (Pagnoni et al. 2024, arXiv 2412.09871): bytes → patches → latent Transformer → bytes.

    bytes    BOS T h e _ c a t          byte and hashed n-gram embeddings, windowed local encoder        (3.2)
    patches   |  \\_____/ \\___           complete patches query their own bytes                            (3.2.2)
    latents   g0    g1                  causal Transformer over complete patches                         (3.1)
    bytes     g0 g0g0g0g1 g1 ..         each byte reads the newest complete patch                        (3.3)

The byte at t sees the latent of the last patch that is complete when byte t has been read: of its own patch only if
byte t + 1 starts a new one. So a latent step happens exactly when a patch is complete, and reading incrementally is the
same computation as reading at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.interfaces.model import ByteModel, LookupTable, Stage
from bytelm.models.blt.cross import BytesFromPatches, PatchesFromBytes
from bytelm.models.blt.pool import run_maxima
from bytelm.nn import cross
from bytelm.nn.attention import Cache, CausalPattern, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.ngrams import PRIMES, NgramEmbedding, table_problems
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.base import Patcher, PatchState
from bytelm.patching.layout import Layout, Rows, forced_openings, tail
from bytelm.transfer import to_device
from bytelm.units import VOCAB


@dataclass(frozen=True)
class Config:
    """Shape of a BLT. The defaults are those of `blt-tiny`.

    `queries`: sub-vectors of a patch (the paper's k). `encoder_cross`: patches query the bytes after the "last" encoder
    layer, or after "all". `attention_window`: of the local models, in bytes. `ngram_rows`: rows per hash table, one
    table for each of `ngram_functions` × `ngram_sizes`. `ngram_output`: rows are twice as wide, and their second halves
    are added to what the decoder's last norm reads (not in the paper). `ffn_dims`: feed-forward widths of encoder,
    latent Transformer and decoder; default: 8/3 of each width, rounded up to a multiple of `ffn_multiple`.
    """

    patched: ClassVar[bool] = True

    local_dim: int = 128
    local_heads: int = 4
    attention_window: int = 128
    encoder_layers: int = 1
    decoder_layers: int = 3
    global_dim: int = 256
    global_heads: int = 4
    global_layers: int = 4
    queries: int = 2
    cross_heads: int = 4
    encoder_cross: str = "last"
    ngram_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    ngram_functions: int = 1
    ngram_rows: int = 8192
    ngram_output: bool = False
    theta: float = 500_000.0
    ffn_multiple: int = 64
    ffn_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ffn_dims) not in (0, 3):
            raise ConfigError(
                f"model.ffn_dims = {list(self.ffn_dims)}: give one each for encoder, latent and decoder, or none"
            )
        local = [*self.encoder().problems("model.local"), *self.decoder().problems("model.local")]
        problems = [*dict.fromkeys(local), *self.latent().problems("model.global")]
        if self.cross_heads < 1 or self.local_dim % self.cross_heads:
            problems.append(f"model.cross_heads = {self.cross_heads} does not divide local_dim = {self.local_dim}")
        if self.encoder_cross not in ("last", "all"):
            problems.append(f"model.encoder_cross = {self.encoder_cross!r}: known: last, all")
        if not 1 <= self.ngram_functions <= len(PRIMES):
            problems.append(f"model.ngram_functions = {self.ngram_functions}: from 1 to {len(PRIMES)}")
        problems += table_problems(self.ngram_sizes, self.ngram_rows, self.ngram_output)
        counted = ("encoder_layers", "decoder_layers", "global_layers", "queries")
        problems += [f"model.{n} = {getattr(self, n)}: must be at least 1" for n in counted if getattr(self, n) < 1]
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes for the invariant tests, together covering every path of this file."""
        bytes = cls(local_dim=16, local_heads=2, cross_heads=2, attention_window=6, decoder_layers=2, ngram_rows=101)
        small = replace(bytes, global_dim=32, global_heads=2, global_layers=2, ffn_multiple=16)
        return {
            "last layer crossed": small,
            "all layers crossed, widened": replace(
                small, encoder_layers=2, encoder_cross="all", global_dim=48, ffn_dims=(24, 16, 56)
            ),
            "two hash functions": replace(small, ngram_functions=2, ngram_sizes=(2, 5), queries=1),
            "no n-grams": replace(small, ngram_sizes=()),
            "n-grams to the output": replace(small, ngram_output=True),
        }

    def encoder(self) -> StackConfig:
        """The shape of the local encoder over bytes."""
        return self._stack(self.encoder_layers, self.local_dim, self.local_heads, self.attention_window, 0)

    def latent(self) -> StackConfig:
        """The shape of the latent Transformer over patches."""
        return self._stack(self.global_layers, self.global_dim, self.global_heads, None, 1)

    def decoder(self) -> StackConfig:
        """The shape of the local decoder over bytes."""
        return self._stack(self.decoder_layers, self.local_dim, self.local_heads, self.attention_window, 2)

    def _stack(self, layers: int, dim: int, heads: int, window: int | None, part: int) -> StackConfig:
        ffn_dim = self.ffn_dims[part] if self.ffn_dims else None
        return StackConfig(layers, dim, heads, window, self.theta, self.ffn_multiple, ffn_dim=ffn_dim)

    def build(self, patcher: Patcher) -> BLT:
        """The model, parameters uninitialised."""
        return BLT(self, patcher)


TRAVEL = ("segment", "closed")
"""The fields of a layout that are needed on the model's device."""


@dataclass(frozen=True)
class Plan:
    """What is derived from ids on the host; ids, starts and recent ids also on the model's device."""

    rows: Rows
    ids: Int[Tensor, "batch new"]
    starts: Bool[Tensor, "batch new"]
    recent: Int[Tensor, "batch reach"]
    patcher: PatchState
    view: CausalPattern
    layout: Layout
    reached: Int[Tensor, "batch reach"]
    """The ids that later n-grams reach."""
    hashes: Int[Tensor, "batch new tables"] | None
    """Of n-grams, for tables that stay on the host; None where they are on the model's device."""


@dataclass(frozen=True)
class BLTState:
    """The state of rows; only the latent caches grow with the bytes read."""

    patcher: PatchState
    bytes: RowPositions
    patches: RowPositions
    recent: Int[Tensor, "batch reach"]
    """The ids that later n-grams reach."""
    held: Int[Tensor, " batch"]
    """Bytes read of the incomplete patch."""
    open: tuple[Float[Tensor, "batch slots dim"], ...]
    """Encoder outputs of those bytes, right-aligned, for each layer that patches query."""
    latent: Float[Tensor, "batch k dim"]
    """The newest complete patch, as the decoder reads it."""
    encoder: tuple[Cache, ...]
    latents: tuple[Cache, ...]
    decoder: tuple[Cache, ...]


class Encoder(nn.Module):
    """Bytes to byte states, and those of complete patches to patches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, dim = config, config.local_dim
        rows, parts = config.ngram_rows, 1 + config.ngram_output
        self.embed = NgramEmbedding(dim, config.ngram_sizes, config.ngram_functions, rows, parts)
        self.stack = Stack(config.encoder())
        self.crossed = range(config.encoder_layers)[-1 if config.encoder_cross == "last" else 0 :]
        self.split = Linear(dim, dim * config.queries)
        self.cross = nn.ModuleList(PatchesFromBytes(dim, config.cross_heads) for _ in self.crossed)

    def forward(
        self, x: Tensor, view: CausalPattern, caches: tuple[Cache, ...] | None
    ) -> tuple[list[Tensor], tuple[Cache, ...]]:
        """Byte states after each layer that patches query (the last layer's last), and the caches."""
        states, kept = list[Tensor](), list[Cache]()
        for index in range(self.config.encoder_layers):
            x, cache = self.stack.layer(index, x, view, caches)
            states += [x] if index in self.crossed else []
            kept += [] if cache is None else [cache]
        return states, tuple(kept)

    def patches(self, states: list[Tensor], layout: Layout) -> Float[Tensor, "batch patches width"]:
        """The completed patches: queries max-pooled from their bytes, then the cross-attentions."""
        batch, count = len(layout.counts), layout.patches
        segment = layout.segment.flatten()
        pooled = run_maxima(states[0].flatten(0, 1), segment, batch * count)
        queries = self.split(pooled).unflatten(-1, (self.config.queries, -1))
        for layer, bytes in zip(self.cross, states, strict=True):
            queries = layer(queries, bytes.flatten(0, 1), segment)
        return queries.flatten(1).unflatten(0, (batch, count))


class Decoder(nn.Module):
    """Byte states and latents to logits: before each block, every byte reads its patch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, dim = config, config.local_dim
        self.split = Linear(config.global_dim, dim * config.queries)
        self.cross = nn.ModuleList(BytesFromPatches(dim, config.cross_heads) for _ in range(config.decoder_layers))
        self.stack = Stack(config.decoder())
        self.norm = RMSNorm(dim)
        self.head = Linear(dim, VOCAB)

    def forward(
        self,
        x: Float[Tensor, "batch new dim"],
        latents: Float[Tensor, "batch patches k dim"],
        index: Int[Tensor, "batch new"],
        view: CausalPattern,
        caches: tuple[Cache, ...] | None,
        beyond: Float[Tensor, "batch new dim"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], tuple[Cache, ...]]:
        """`index`: the latent that each byte reads. `beyond`: of n-grams, for the output."""
        kept: list[Cache] = []
        for layer, read in enumerate(self.cross):
            x, cache = self.stack.layer(layer, read(x, latents, index), view, caches)
            kept += [] if cache is None else [cache]
        return self.head(self.norm(x if beyond is None else x + beyond)).float(), tuple(kept)


class BLT(ByteModel):
    """Local encoder, latent Transformer over patches, local decoder, and the patcher."""

    def __init__(self, config: Config, patcher: Patcher) -> None:
        super().__init__()
        self.config = config
        self.patcher = patcher.requires_grad_(False)
        self.encoder = Encoder(config)
        width = config.queries * config.local_dim
        same = width == config.global_dim
        self.widen = nn.Identity() if same else Linear(width, config.global_dim)
        self.latent = Stack(config.latent())
        self.decoder = Decoder(config)

    @property
    def cutter(self) -> Patcher:
        """The patcher, never None."""
        assert self.patcher is not None
        return self.patcher

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`; the patcher's parameters are unchanged."""
        layers = (self.config.encoder_layers, 1, self.config.global_layers, self.config.decoder_layers)
        for number, part in enumerate((self.encoder, self.widen, self.latent, self.decoder)):
            init_weights(part, layers[number], seed + number)

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`."""
        config, dim, k = self.config, self.config.local_dim, self.config.queries
        width = dim * k
        encoder = config.encoder().flops(ids) + 2 * patches * dim * width
        encoder += len(self.encoder.cross) * cross.flops(dim, queries=patches * k, keys=ids)
        widen = 2 * patches * width * config.global_dim if width != config.global_dim else 0
        latent = config.latent().flops(patches) + 2 * patches * config.global_dim * width
        decoder = config.decoder().flops(ids) + 2 * ids * dim * VOCAB
        decoder += config.decoder_layers * cross.flops(dim, queries=ids, keys=(patches + 1) * k)
        return encoder + widen + latent + decoder

    def set_dropout(self, chance: float) -> None:
        """See `ByteModel`; of n-grams too."""
        super().set_dropout(chance)
        self.encoder.embed.dropout = chance

    def units(self) -> list[nn.Module]:
        """See `ByteModel`; every pass of a training completes a patch, as its first id starts one."""
        return [*super().units(), *self.encoder.cross, *self.decoder.cross]

    def lookup_tables(self) -> list[LookupTable]:
        """See `ByteModel`."""
        return [] if self.encoder.embed.ngram is None else [self.encoder.embed]

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`. In addition to the stacks: embeddings, norms and cross-attentions."""
        config, dim, k = self.config, self.config.local_dim, self.config.queries
        tables = 8 * len(config.ngram_sizes) * config.ngram_functions
        pooled = len(self.encoder.cross) * 6 * dim + 4 * dim + tables
        read = config.decoder_layers * (10 * dim + 4 * k * config.cross_heads) + (6 + 4 * config.ngram_output) * dim
        copied = 4 * k * dim + 10 * k * config.cross_heads  # of queries or keys, and of values, for each byte
        parts = config.decoder_layers * 10 * k * dim + len(self.encoder.cross) * 10 * k * dim
        return [
            Stage("local", self.encoder.stack, ids, beside=pooled, plain=len(self.encoder.cross) * copied),
            Stage("global", self.latent, patches, beside=parts),
            Stage("local", self.decoder.stack, ids, beside=read, plain=config.decoder_layers * copied),
        ]

    @property
    def device(self) -> torch.device:
        """See `ByteModel`."""
        return self.decoder.norm.weight.device

    def initial_state(self, batch: int) -> BLTState:
        """See `ByteModel`."""
        config, device = self.config, self.device
        return BLTState(
            patcher=self.cutter.initial_state(batch),
            bytes=RowPositions.zero(batch),
            patches=RowPositions.zero(batch),
            recent=self.encoder.embed.initial_state(batch),
            held=torch.zeros(batch, dtype=torch.long),
            open=(torch.zeros(batch, 0, config.local_dim, device=device),) * len(self.encoder.crossed),
            latent=torch.zeros(batch, config.queries, config.local_dim, device=device),
            encoder=self.encoder.stack.initial_state(batch, device),
            latents=self.latent.initial_state(batch, device),
            decoder=self.decoder.stack.initial_state(batch, device),
        )

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: BLTState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], BLTState | None]:
        """See `ByteModel`."""
        plan = plan or self.plan(ids, state, boundaries)
        keep = state is not None
        state = state if state is not None else self.initial_state(len(ids))
        rows, view, layout = plan.rows, plan.view, plan.layout

        x = self.encoder.embed(plan.ids, plan.starts, plan.recent, plan.hashes)
        x, beyond = x.chunk(2, -1) if self.config.ngram_output else (x, None)
        # Both local models have the same width, window and positions: they share one view.
        states, encoder = self.encoder(x, view, state.encoder if keep else None)
        x = states[-1]
        held = [torch.cat([old.to(new.dtype), new], 1) for old, new in zip(state.open, states, strict=True)]
        latents, patches, latent_caches = self.latent_step(held, layout, state, keep)
        logits, decoder = self.decoder(x, latents, layout.closed, view, state.decoder if keep else None, beyond)
        if not keep:
            return rows.restore(logits), None

        width, ends = int(layout.held.max()) if len(layout.held) else 0, state.open[0].shape[1] + rows.lengths
        return rows.restore(logits), BLTState(
            patcher=plan.patcher,
            bytes=view.after,
            patches=patches,
            recent=plan.reached,
            held=layout.held,
            open=tuple(tail(h, ends, width) for h in held),
            latent=latents[torch.arange(len(ids), device=latents.device), to_device(layout.counts, latents)],
            encoder=encoder,
            latents=latent_caches,
            decoder=decoder,
        )

    def plan(
        self,
        ids: Int[Tensor, "batch new"],
        state: BLTState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> Plan:
        """See `ByteModel`."""
        caches = state.encoder if state is not None else None
        state = state if state is not None else self.initial_state(len(ids))
        rows = Rows.of(ids)
        starts = rows.starts(state.bytes.position)
        patcher = state.patcher
        if boundaries is None:
            opens, patcher = self.cutter.extend(rows.ids, patcher)
        else:
            opens = (rows.align(boundaries) | forced_openings(rows.ids, starts)) & rows.real
        layout = Layout.of(opens, starts, rows, state.held, state.open[0].shape[1])
        there = (to_device(x, self.device) for x in (rows.ids, starts, state.recent))
        return Plan(
            rows,
            *there,
            patcher=patcher,
            view=self.encoder.stack.view(rows.lengths, starts, state.bytes, caches),
            layout=replace(layout, **{name: to_device(getattr(layout, name), self.device) for name in TRAVEL}),
            reached=self.encoder.embed.reached(rows, starts, state.recent),
            hashes=self.encoder.embed.hashes_on_host(rows.ids, starts, state.recent),
        )

    def latent_step(
        self, held: list[Tensor], layout: Layout, state: BLTState, keep: bool
    ) -> tuple[Float[Tensor, "batch readable k dim"], RowPositions, tuple[Cache, ...]]:
        """One latent step per completed patch, in the rows that have one.

        Returns what the decoder may read (the newest patch so far, then those completed now), each row's position among
        its patches, and the latent caches.
        """
        newest = state.latent[:, None]
        if not layout.patches:
            return newest, state.patches, state.latents
        patches, caches = self.widen(self.encoder.patches(held, layout)), state.latents if keep else None
        latents, where, caches = self.latent.advance(patches, layout.counts, layout.first, state.patches, caches)
        latents = self.decoder.split(latents).unflatten(-1, (self.config.queries, -1))
        return torch.cat([newest.to(latents.dtype), latents], 1), where, caches or ()
