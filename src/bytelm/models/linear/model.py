"""The linear Transformer (Katharopoulos et al. 2020): `nn.transformer` with linear attention, a state of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.interfaces.model import ByteModel, Stage
from bytelm.models.linear import attention as linear
from bytelm.models.linear.attention import LinearView, Sums
from bytelm.nn.attention import RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.layout import Rows
from bytelm.transfer import to_device
from bytelm.units import VOCAB


@dataclass(frozen=True)
class Config:
    """Shape of a linear Transformer. More `heads` mean a smaller state: head_dim × head_dim per head."""

    patched: ClassVar[bool] = False

    layers: int = 6
    dim: int = 256
    heads: int = 4
    theta: float = 10_000.0
    ffn_multiple: int = 64

    def __post_init__(self) -> None:
        if problems := self.stack().problems("model"):
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """A small shape for the invariant tests."""
        return {"two heads": cls(layers=2, dim=16, heads=2, ffn_multiple=16)}

    def stack(self) -> StackConfig:
        """The shape of the one stack."""
        return StackConfig(self.layers, self.dim, self.heads, None, self.theta, self.ffn_multiple)

    def build(self) -> LinearTransformer:
        """The model, parameters uninitialised."""
        return LinearTransformer(self)


Plan = tuple[Rows, Int[Tensor, "batch new"], LinearView]
"""Rows on the host, their ids on the model's device, and the attention pattern."""


@dataclass(frozen=True)
class LinearState:
    """The position of each row, and the sums of its layers."""

    where: RowPositions
    sums: tuple[Sums, ...]


class LinearTransformer(ByteModel):
    """Embedding, a stack with linear attention, norm, linear."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCAB, config.dim)
        self.stack = Stack(config.stack())
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, VOCAB)

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`."""
        init_weights(self, self.config.layers, seed)

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`."""
        config = self.config
        layer = config.stack().products(ids) + linear.flops(config.dim, config.heads, ids)
        return config.layers * layer + 2 * ids * config.dim * VOCAB

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`. In addition to the stack, in float32: q, k, v, features, rotated too, a chunk's weights."""
        features = 32 * self.config.dim + 8 * self.config.heads * linear.CHUNK
        return [Stage("local", self.stack, ids, beside=6 * self.config.dim + self.config.layers * features)]

    def initial_state(self, batch: int) -> LinearState:
        """See `ByteModel`."""
        config = self.config
        nothing = Sums.zero(batch, config.heads, config.dim // config.heads, self.device)
        return LinearState(RowPositions.zero(batch), (nothing,) * config.layers)

    def plan(self, ids: Int[Tensor, "batch new"], state: LinearState | None = None, boundaries: Any = None) -> Plan:
        """See `ByteModel`."""
        rows, config = Rows.of(ids), self.config
        where = state.where if state else RowPositions.zero(len(ids))
        shape = (config.dim // config.heads, config.theta)
        view = LinearView.of(rows.lengths, rows.starts(where.position), where, *shape, self.device)
        return rows, to_device(rows.ids, self.device), view

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: LinearState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], LinearState | None]:
        """See `ByteModel`; `boundaries` are ignored."""
        rows, ids, view = plan or self.plan(ids, state)
        x, kept = self.stack(self.embedding(ids), view, state.sums if state else None)
        logits = self.head(self.norm(x)).float()
        return rows.restore(logits), None if kept is None else LinearState(view.after, kept)
