"""PerceiverAR (Hawthorne et al. 2022, arXiv 2202.07765): cross-attention to all inputs, many layers over few latents.

    ids        BOS a b c | d e f g | h       blocks of 4 latents, counted from the start of the document
    inputs      o  o o o   o o o o   o       every latent reads all inputs up to its own: one layer of cross-attention
    latents     l>>l>l>l | l>l>l>l | l       ... then the latents of its own block up to itself, in all other layers

In the paper the latents are the last N positions read, so that each further byte moves all of them and nothing can be
cached. Here they are in blocks: a latent belongs to its byte, a state continues exactly, and one pass trains every byte
instead of the last N. The price: a byte has between 1 and N latents, by its place in the block, where the paper reads
with a stride to have many; and bytes at the start of a block see those before it only by cross-attention.

Queries and keys of the cross-attention are from the same embeddings, so that it is a layer of self-attention whose
outputs are the latents. Norms, rotary positions and feed-forward layers are those of `nn`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.interfaces.model import ByteModel, Stage
from bytelm.nn.attention import Cache, CausalPattern, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.layout import Rows, since
from bytelm.transfer import to_device
from bytelm.units import VOCAB


@dataclass(frozen=True)
class Config:
    """`latents`: positions in a block (the paper's N). `layers`: of self-attention, besides the cross-attention."""

    patched: ClassVar[bool] = False

    latents: int = 256
    layers: int = 5
    dim: int = 256
    heads: int = 4
    theta: float = 10_000.0
    ffn_multiple: int = 64

    def __post_init__(self) -> None:
        problems = self.inner().problems("model")
        if self.latents < 1:
            problems.append(f"model.latents = {self.latents}: must be at least 1")
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes for the invariant tests, together covering every path of this file."""
        blocks = cls(latents=5, layers=2, dim=16, heads=2, ffn_multiple=16)
        return {"blocks of 5": blocks, "one block": replace(blocks, latents=1000, layers=1)}

    def cross(self) -> StackConfig:
        """The shape of the one layer that reads all inputs."""
        return StackConfig(1, self.dim, self.heads, None, self.theta, self.ffn_multiple)

    def inner(self) -> StackConfig:
        """The shape of the layers over latents; the window drops cached keys before the block."""
        return StackConfig(self.layers, self.dim, self.heads, self.latents, self.theta, self.ffn_multiple)

    def build(self) -> PerceiverAR:
        """The model, parameters uninitialised."""
        return PerceiverAR(self)


Plan = tuple[Rows, Int[Tensor, "batch new"], CausalPattern, CausalPattern]
"""Rows on the host, their ids on the model's device, the attention patterns of inputs and latents."""


@dataclass(frozen=True)
class PerceiverState:
    """Each row's position in its document and block, caches of all inputs, and those of the block."""

    inputs: RowPositions
    block: RowPositions
    cross: tuple[Cache, ...]
    latents: tuple[Cache, ...]


class PerceiverAR(ByteModel):
    """Embedding, cross-attention, latents in blocks, norm, linear."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCAB, config.dim)
        self.cross = Stack(config.cross())
        self.latents = Stack(config.inner())
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, VOCAB)

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`."""
        init_weights(self, 1 + self.config.layers, seed)

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`."""
        return self.config.cross().flops(ids) + self.config.inner().flops(ids) + 2 * ids * self.config.dim * VOCAB

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`."""
        return [Stage("local", self.cross, ids, beside=6 * self.config.dim), Stage("local", self.latents, ids)]

    def initial_state(self, batch: int) -> PerceiverState:
        """See `ByteModel`."""
        nowhere = RowPositions.zero(batch)
        caches = (stack.initial_state(batch, self.device) for stack in (self.cross, self.latents))
        return PerceiverState(nowhere, nowhere, *caches)

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: PerceiverState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], PerceiverState | None]:
        """See `ByteModel`; `boundaries` are ignored."""
        rows, ids, wide, inside = plan or self.plan(ids, state)
        x, cross = self.cross(self.embedding(ids), wide, state.cross if state else None)
        x, latents = self.latents(x, inside, state.latents if state else None)
        logits = rows.restore(self.head(self.norm(x)).float())
        if cross is None or latents is None:
            return logits, None
        return logits, PerceiverState(wide.after, inside.after, cross, latents)

    def plan(self, ids: Int[Tensor, "batch new"], state: PerceiverState | None = None, boundaries: Any = None) -> Plan:
        """See `ByteModel`."""
        rows = Rows.of(ids)
        nowhere = RowPositions.zero(len(ids))
        begun = state or PerceiverState(nowhere, nowhere, (), ())
        starts = rows.starts(begun.inputs.position)
        place = since(starts, begun.inputs.position - begun.inputs.start - 1)
        opens = starts | ((place % self.config.latents == 0) & rows.real)

        wide = self.cross.view(rows.lengths, starts, begun.inputs, state.cross if state else None)
        inside = self.latents.view(rows.lengths, opens, begun.block, state.latents if state else None)
        return rows, to_device(rows.ids, self.device), wide, inside
