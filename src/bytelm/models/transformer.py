"""The byte Transformer: one causal stack over bytes, with full or windowed attention (two baselines in one file)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.models.base import ByteModel, Stage
from bytelm.nn.attention import Cache, Where
from bytelm.nn.initialise import initialise
from bytelm.nn.norm import RMSNorm
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.layout import Rows
from bytelm.units import VOCAB

NEWLINE = ord("\n")


@dataclass(frozen=True)
class Config:
    """`window`: bytes that a byte sees, itself included; left out, all before it. `theta`: rotary base.

    `reset_newline`: each newline starts a fresh context, as a BOS does (for scorers).
    """

    patched: ClassVar[bool] = False

    layers: int = 6
    dim: int = 256
    heads: int = 4
    window: int | None = None
    theta: float = 10_000.0
    ffn_multiple: int = 64
    reset_newline: bool = False

    def __post_init__(self) -> None:
        if problems := self.stack().problems("model"):
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes that between them reach every path of this file: what the laws are tried on."""
        full = cls(layers=2, dim=16, heads=2, ffn_multiple=16)
        return {"full": full, "windowed": replace(full, window=6)}

    def stack(self) -> StackConfig:
        """The shape of the one stack."""
        return StackConfig(self.layers, self.dim, self.heads, self.window, self.theta, self.ffn_multiple)

    def build(self) -> ByteTransformer:
        """The model of this configuration, its parameters not yet initialised."""
        return ByteTransformer(self)


@dataclass(frozen=True)
class TransformerState:
    """Where each row stands, and the caches of its layers."""

    where: Where
    caches: tuple[Cache, ...]


class ByteTransformer(ByteModel):
    """Embedding, stack, norm, linear: every byte is a position."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCAB, config.dim)
        self.stack = Stack(config.stack())
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCAB, bias=False)

    def initialise(self, seed: int) -> None:
        """Set every parameter from `seed`."""
        initialise(self, self.config.layers, seed)

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`; there are no patches here."""
        return self.config.stack().flops(ids) + 2 * ids * self.config.dim * VOCAB

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`."""
        return [Stage("local", self.stack, ids, beside=6 * self.config.dim)]

    def begin(self, batch: int) -> TransformerState:
        """The state of rows that have read nothing yet."""
        return TransformerState(Where.zero(batch, self.device), self.stack.begin(batch, self.device))

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: TransformerState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], TransformerState | None]:
        """See `ByteModel`. There are no patches here: `boundaries` are not looked at."""
        rows = Rows.of(ids)
        begun = state or TransformerState(Where.zero(len(ids), ids.device), ())
        starts = rows.starts(begun.where.position)
        if self.config.reset_newline:
            starts = starts | (rows.ids == NEWLINE)
        caches = state.caches if state else None
        view = self.stack.view(rows.lengths, starts, begun.where, caches)
        x, kept = self.stack(self.embedding(rows.ids), view, caches)
        logits = self.head(self.norm(x)).float()
        return rows.restore(logits), None if kept is None else TransformerState(view.after, kept)
