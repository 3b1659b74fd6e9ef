"""The networks of H-Net: stages that cut what they read into chunks, and the innermost one over chunks of chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.models.hnet.chunking import Router, gathered, ratio_loss, smoothed, straight_through
from bytelm.models.hnet.layers import Memory, stack_of
from bytelm.nn.attention import CausalPattern, RowPositions
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.patching.layout import at_end, fronted
from bytelm.transfer import to_device, to_host

if TYPE_CHECKING:
    from bytelm.models.hnet.model import Config

MOST = 1 - 1e-4  # of the probabilities by which the published code smooths


@dataclass(frozen=True)
class InnermostState:
    """The position of each row among the chunks, and the caches of the innermost network."""

    where: RowPositions
    caches: tuple[Memory, ...]


@dataclass(frozen=True)
class StageState:
    """What a stage remembers of rows."""

    where: RowPositions
    encoder: tuple[Memory, ...]
    decoder: tuple[Memory, ...]
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
        self.stack = stack_of(config.innermost())
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


class Residual(nn.Linear):
    """With a bias, and not in bfloat16, as the published code has it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, input: Float[Tensor, "batch new dim"]) -> Float[Tensor, "batch new dim"]:
        """One product."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class ChunkingStage(nn.Module):
    """Encoder, router, the inner network over chunks, decoder."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.target = config.ratios[stage]
        self.widen = Widen(config.dims[max(0, stage - 1)], dim)
        self.encoder = stack_of(config.encoder(stage))
        self.encoder_norm = RMSNorm(dim)
        self.router = Router(dim)
        self.inner = Innermost(config) if stage == len(config.ratios) - 1 else ChunkingStage(config, stage + 1)
        self.residual = Residual(dim) if config.published else Linear(dim, dim)
        self.decoder = stack_of(config.decoder(stage))
        self.norm = RMSNorm(dim)
        self.most = MOST if config.published else 1.0
        """What a chunk's output has at most of its own."""

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
        beyond: Float[Tensor, "batch new dim"] | None = None,
    ) -> Chunked:
        """Read the first `counts` positions of each row, after what `state` has read; documents begin at `starts`.

        `beyond`: added to the outputs before the norm.
        """
        outer = x.shape[-1]
        view = view or self.view(counts, starts, state if keep else None)
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
        y = self.norm(y if beyond is None else y + beyond)[..., :outer]
        numbers = (opens.sum(1), *inside.counts)
        depth = opens.long()
        depth[opens] += inside.depth[torch.arange(inside.depth.shape[1]) < numbers[0][:, None]]
        if not keep:
            there = (to_device(opens, x), to_device(real, x))
            return Chunked(y, None, depth, inside.loss + ratio_loss(probability, *there, self.target), numbers)
        newest = latents[torch.arange(len(x), device=x.device), to_device(numbers[0], x)]
        key = at_end(keys, counts, state.key.to(keys.dtype))
        after = StageState(view.after, encoder or (), decoder or (), key, newest, inside.state)
        return Chunked(y, after, depth, counts=numbers)

    def view(
        self, counts: Int[Tensor, " batch"], starts: Bool[Tensor, "batch new"], state: StageState | None
    ) -> CausalPattern:
        """What new positions see, in encoder and decoder: they have the same width, window and positions."""
        where = state.where if state else RowPositions.zero(len(counts))
        return self.encoder.view(counts, starts, where, (*state.encoder, *state.decoder) if state else None)

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
        begins = starts.gather(1, slots)
        found = self.inner(gathered(x, slots), counts, begins, state.inner, keep)
        chance = probability.gather(1, to_device(slots, x)).clamp(max=self.most)
        mixed = smoothed(found.outputs, chance, begins, state.chunk)
        return torch.cat([newest.to(mixed.dtype), mixed], 1), found

    def nothing(self, batch: int) -> tuple[Int[Tensor, " batch"], ...]:
        """The counts of rows in which nothing is read."""
        return (torch.zeros(batch, dtype=torch.long), *self.inner.nothing(batch))
