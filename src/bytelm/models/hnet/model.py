"""H-Net (Hwang et al. 2025, arXiv 2507.07955): bytes → chunks that the model learns to cut → bytes, one stage or more.

    bytes      T h e _ c a t          embedding, encoder: a windowed Transformer                 E
               |     | |              `chunking`: the encoder's outputs where a chunk opens
    chunks     T     _ c              the inner network: again such a stage, or a Transformer    M
               z0z0z0z1z2z2z2         smoothed, read by each byte, the encoder's outputs added
    bytes      T h e _ c a t          decoder: a windowed Transformer                            D

All networks end with a norm. Attention is in place of the paper's state-space layers. A chunk enters the inner network
with its first byte, so that nothing is held back, and reading incrementally is the same computation as reading at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.interfaces.model import ByteModel, Chunking, Stage
from bytelm.models.hnet.chunking import Router, gathered, ratio_loss, smoothed, straight_through
from bytelm.nn.attention import Cache, CausalPattern, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.layout import Rows, at_end, fronted
from bytelm.transfer import to_device, to_host
from bytelm.units import VOCAB


@dataclass(frozen=True)
class Config:
    """Shape of an H-Net: lists have a value per network, outermost first; `dims` and `heads` end with the innermost.

    `ratios`: the mean length of a chunk at each stage, in positions of that stage, at which training aims.
    `ratio_weight`: of the ratio loss (the paper's alpha). `attention_window`: of encoders and decoders, in positions.
    """

    patched: ClassVar[bool] = False

    dims: tuple[int, ...] = (128, 256)
    heads: tuple[int, ...] = (4, 4)
    encoder_layers: tuple[int, ...] = (2,)
    decoder_layers: tuple[int, ...] = (2,)
    layers: int = 4
    ratios: tuple[float, ...] = (6.0,)
    ratio_weight: float = 0.03
    attention_window: int = 128
    theta: float = 10_000.0
    ffn_multiple: int = 64

    def __post_init__(self) -> None:
        stages, problems = len(self.ratios), list[str]()
        for name, expected in (("dims", 1), ("heads", 1), ("encoder_layers", 0), ("decoder_layers", 0)):
            if len(given := getattr(self, name)) != stages + expected:
                problems.append(
                    f"model.{name} = {list(given)}: {stages} stages of model.ratios need {stages + expected}"
                )
        if not stages:
            problems.append("model.ratios = []: give at least one")
        if any(not 1 < ratio < math.inf for ratio in self.ratios):
            problems.append(f"model.ratios = {list(self.ratios)}: must be above 1, and finite")
        if not 0 <= self.ratio_weight < math.inf:
            problems.append(f"model.ratio_weight = {self.ratio_weight}: must be at least 0, and finite")
        if list(self.dims) != sorted(self.dims):
            problems.append(f"model.dims = {list(self.dims)}: no inner network may be narrower than the one around it")
        if not problems:
            stacks = [self.innermost(), *(f(s) for s in range(stages) for f in (self.encoder, self.decoder))]
            problems = list(dict.fromkeys(problem for stack in stacks for problem in stack.problems("model")))
            layers = (*self.encoder_layers, *self.decoder_layers, self.layers)
            if min(layers) < 1:
                problems.append(f"model.encoder_layers, decoder_layers, layers = {list(layers)}: must be at least 1")
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes for the invariant tests, together covering every path of this file."""
        one = cls(
            (16, 32), (2, 2), (1,), (2,), layers=2, ratios=(3.0,), attention_window=6, theta=100.0, ffn_multiple=16
        )
        two = {"dims": (16, 16, 24), "heads": (2, 2, 2), "encoder_layers": (2, 1), "decoder_layers": (1, 1)}
        return {"one stage": one, "two stages": replace(one, **two, ratios=(2.0, 1.5))}

    def encoder(self, stage: int) -> StackConfig:
        """The shape of a stage's encoder."""
        return self._stack(self.encoder_layers[stage], stage, self.attention_window)

    def decoder(self, stage: int) -> StackConfig:
        """The shape of a stage's decoder."""
        return self._stack(self.decoder_layers[stage], stage, self.attention_window)

    def innermost(self) -> StackConfig:
        """The shape of the innermost network."""
        return self._stack(self.layers, len(self.ratios), None)

    def _stack(self, layers: int, stage: int, window: int | None) -> StackConfig:
        return StackConfig(layers, self.dims[stage], self.heads[stage], window, self.theta, self.ffn_multiple)

    def positions(self, ids: int, patches: int) -> list[int]:
        """Positions of each network, outermost first, for so many ids and chunks of the first stage."""
        found = [ids, patches]
        for ratio in self.ratios[1:]:
            found.append(max(1, round(found[-1] / ratio)))
        return found

    def build(self) -> HNet:
        """The model, parameters uninitialised."""
        return HNet(self)


Plan = tuple[Rows, Int[Tensor, "batch new"], Bool[Tensor, "batch new"], CausalPattern]
"""Rows on the host, their ids on the model's device, where documents start, and the attention pattern of bytes."""


@dataclass(frozen=True)
class InnermostState:
    """The position of each row among the chunks, and the caches of the innermost network."""

    where: RowPositions
    caches: tuple[Cache, ...]


@dataclass(frozen=True)
class StageState:
    """What a stage remembers of rows."""

    where: RowPositions
    encoder: tuple[Cache, ...]
    decoder: tuple[Cache, ...]
    key: Float[Tensor, "batch dim"]
    """Of the router, of the newest position."""
    chunk: Float[Tensor, "batch dim"]
    """The newest chunk's output, smoothed."""
    inner: Any


@dataclass(frozen=True)
class Chunked:
    """What a network makes of positions."""

    outputs: Float[Tensor, "batch new dim"]
    state: Any
    depth: Int[Tensor, "batch new"]
    """In how many stages a position opens a chunk, on the host."""
    loss: Float[Tensor, " batch"] | float = 0.0
    """Ratio losses of a row, summed over stages."""
    counts: tuple[Int[Tensor, " batch"], ...] = ()
    """See `Chunking`."""


class Innermost(nn.Module):
    """A Transformer over chunks, and a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.widen = Widen(config.dims[-2], config.dims[-1])
        self.stack = Stack(config.innermost())
        self.norm = RMSNorm(config.dims[-1])

    def initial_state(self, batch: int) -> InnermostState:
        """The state of rows that have read nothing."""
        return InnermostState(RowPositions.zero(batch), self.stack.initial_state(batch, self.norm.weight.device))

    def forward(
        self,
        x: Float[Tensor, "batch new dim"],
        counts: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        state: InnermostState,
        keep: bool,
    ) -> Chunked:
        """Read the first `counts` positions of each row; at least one row has some."""
        y, where, caches = self.stack.advance(
            self.widen(x), counts, starts, state.where, state.caches if keep else None
        )
        y = self.norm(y)[..., : x.shape[-1]]
        return Chunked(y, InnermostState(where, caches or ()), torch.zeros(x.shape[:2], dtype=torch.long))

    def nothing(self, batch: int) -> tuple[Int[Tensor, " batch"], ...]:
        """The counts of rows in which nothing is read: it opens no chunks."""
        return ()


class Widen(nn.Module):
    """Vectors with a trained vector behind them (the paper's way to a wider network; the way back takes the front)."""

    def __init__(self, dim: int, wider: int) -> None:
        super().__init__()
        self.pad = nn.Embedding(1, wider - dim) if wider > dim else None

    def forward(self, x: Float[Tensor, "batch new dim"]) -> Float[Tensor, "batch new wider"]:
        """`x` in the wider network's width."""
        if self.pad is None:
            return x
        return torch.cat([x, self.pad.weight.to(x.dtype).expand(*x.shape[:2], -1)], -1)


class ChunkingStage(nn.Module):
    """Encoder, router, the inner network over chunks, decoder."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.target = config.ratios[stage]
        self.widen = Widen(config.dims[max(0, stage - 1)], dim)
        self.encoder = Stack(config.encoder(stage))
        self.encoder_norm = RMSNorm(dim)
        self.router = Router(dim)
        self.inner = Innermost(config) if stage == len(config.ratios) - 1 else ChunkingStage(config, stage + 1)
        self.residual = Linear(dim, dim)
        self.decoder = Stack(config.decoder(stage))
        self.norm = RMSNorm(dim)

    def initial_state(self, batch: int) -> StageState:
        """The state of rows that have read nothing."""
        device = self.norm.weight.device
        nothing = torch.zeros(batch, len(self.norm.weight), device=device)
        return StageState(
            where=RowPositions.zero(batch),
            encoder=self.encoder.initial_state(batch, device),
            decoder=self.decoder.initial_state(batch, device),
            key=nothing,
            chunk=nothing,
            inner=self.inner.initial_state(batch),
        )

    def forward(
        self,
        x: Float[Tensor, "batch new dim"],
        counts: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        state: StageState,
        keep: bool,
        view: CausalPattern | None = None,
    ) -> Chunked:
        """Read the first `counts` positions of each row, after what `state` has read; documents begin at `starts`."""
        outer = x.shape[-1]
        # Encoder and decoder have the same width, window and positions: they share one view.
        view = view or self.encoder.view(counts, starts, state.where, state.encoder if keep else None)
        x, encoder = self.encoder(self.widen(x), view, state.encoder if keep else None)
        x = self.encoder_norm(x)
        probability, keys = self.router(x, starts, state.key)
        real = torch.arange(x.shape[1]) < counts[:, None]
        opens = to_host(probability.detach() >= 0.5) & real
        latents, inside = self.chunks(x, probability, opens, starts, state, keep)
        index = opens.long().cumsum(1)
        confidence = torch.where(to_device(opens, x), probability, 1 - probability)
        y = gathered(latents, index) * straight_through(confidence)[..., None] + self.residual(x)
        y, decoder = self.decoder(y.to(x.dtype), view, state.decoder if keep else None)
        y, numbers = self.norm(y)[..., :outer], (opens.sum(1), *inside.counts)
        depth = opens.long()
        depth[opens] += inside.depth[torch.arange(inside.depth.shape[1]) < numbers[0][:, None]]
        if not keep:
            there = (to_device(opens, x), to_device(real, x))
            return Chunked(y, None, depth, inside.loss + ratio_loss(probability, *there, self.target), numbers)
        newest = latents[torch.arange(len(x), device=x.device), to_device(numbers[0], x)]
        key = at_end(keys, counts, state.key.to(keys.dtype))
        after = StageState(view.after, encoder or (), decoder or (), key, newest, inside.state)
        return Chunked(y, after, depth, counts=numbers)

    def chunks(
        self,
        x: Float[Tensor, "batch new dim"],
        probability: Float[Tensor, "batch new"],
        opens: Bool[Tensor, "batch new"],
        starts: Bool[Tensor, "batch new"],
        state: StageState,
        keep: bool,
    ) -> tuple[Float[Tensor, "batch readable dim"], Chunked]:
        """What positions may read: the newest chunk so far, then those that open now; what the inner network made."""
        newest = state.chunk[:, None]
        if not bool(opens.any()):
            none = torch.zeros(len(x), 0, dtype=torch.long)
            return newest.to(probability.dtype), Chunked(x[:, :0], state.inner, none, counts=self.inner.nothing(len(x)))
        slots, counts = fronted(opens)
        found = self.inner(gathered(x, slots), counts, starts.gather(1, slots), state.inner, keep)
        mixed = smoothed(found.outputs, probability.gather(1, to_device(slots, x)), state.chunk)
        return torch.cat([newest.to(mixed.dtype), mixed], 1), found

    def nothing(self, batch: int) -> tuple[Int[Tensor, " batch"], ...]:
        """The counts of rows in which nothing is read."""
        return (torch.zeros(batch, dtype=torch.long), *self.inner.nothing(batch))


class HNet(ByteModel):
    """Embedding, the outermost stage, linear."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.target_patch = config.ratios[0]
        self.embedding = nn.Embedding(VOCAB, config.dims[0])
        self.stage = ChunkingStage(config, 0)
        self.head = Linear(config.dims[0], VOCAB)

    def chunking_stages(self) -> list[ChunkingStage]:
        """The stages, outermost first."""
        return [part for part in self.modules() if isinstance(part, ChunkingStage)]

    @property
    def innermost(self) -> Innermost:
        """The innermost network."""
        return next(part for part in self.modules() if isinstance(part, Innermost))

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`; residual branches are counted through all networks, as in the paper's code lineage."""
        config = self.config
        init_weights(self, sum(config.encoder_layers) + config.layers + sum(config.decoder_layers), seed)
        for stage in self.chunking_stages():
            stage.router.init_weights()
            nn.init.zeros_(stage.residual.weight)

    def flops(self, ids: int, patches: int, *inner: int) -> int:
        """See `ByteModel`; `inner`: chunks of the further stages, by default as training aims."""
        config = self.config
        *outer, innermost = (ids, patches, *inner) if inner else config.positions(ids, patches)
        found = config.innermost().flops(innermost) + 2 * ids * config.dims[0] * VOCAB
        for stage, positions in enumerate(outer):
            found += config.encoder(stage).flops(positions) + config.decoder(stage).flops(positions)
            found += 3 * 2 * positions * config.dims[stage] ** 2  # router and residual
        return found

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`. In addition to the stacks: norms, router, chunks as read and the residual, in float32."""
        *outer, innermost = self.config.positions(ids, patches)
        found = [Stage("global", self.innermost.stack, innermost, beside=40 * self.config.dims[-1])]
        for stage, positions in zip(self.chunking_stages(), outer, strict=True):
            found.append(Stage("local", stage.encoder, positions, beside=30 * stage.encoder.config.dim))
            found.append(Stage("local", stage.decoder, positions, beside=20 * stage.encoder.config.dim))
        return found

    def initial_state(self, batch: int) -> StageState:
        """See `ByteModel`."""
        return self.stage.initial_state(batch)

    def plan(self, ids: Int[Tensor, "batch new"], state: StageState | None = None, boundaries: Any = None) -> Plan:
        """See `ByteModel`."""
        rows = Rows.of(ids)
        where = state.where if state else RowPositions.zero(len(ids))
        starts = rows.starts(where.position)
        view = self.stage.encoder.view(rows.lengths, starts, where, state.encoder if state else None)
        return rows, to_device(rows.ids, self.device), starts, view

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: StageState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], StageState | None]:
        """See `ByteModel`; `boundaries` are ignored."""
        rows, there, starts, view = plan or self.plan(ids, state)
        begun = self.initial_state(len(ids)) if state is None else state
        found = self.stage(self.embedding(there), rows.lengths, starts, begun, state is not None, view)
        logits = self.head(found.outputs).float()
        auxiliary = None if state else self.auxiliary(found.loss, rows.lengths)
        self.chunking = Chunking(rows.restore(found.depth), found.counts, auxiliary)
        return rows.restore(logits), found.state

    def auxiliary(self, loss: Any, lengths: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """See `Chunking`: the ratio losses of rows, weighted."""
        return self.config.ratio_weight * (loss * to_device(lengths, self.device)).sum()
