"""The Transformer baselines: over bytes, with full or windowed attention, or over BPE tokens.

The model over tokens stores its merges (`data.bpe`) among its weights: a checkpoint needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.data.bpe import Bpe
from bytelm.errors import ConfigError
from bytelm.interfaces.model import ByteModel, Stage
from bytelm.nn.attention import Cache, CausalPattern, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.transformer import Stack, StackConfig
from bytelm.patching.layout import Rows
from bytelm.transfer import to_device
from bytelm.units import VOCAB

NEWLINE = ord("\n")


LARGEST = 1 << 20  # vocabulary: the merges of a larger one would fill memory


@dataclass(frozen=True)
class Config:
    """`attention_window`: bytes that a byte sees, itself included; None for full attention. `theta`: rotary base.

    `reset_newline`: a newline resets the context as BOS does (for entropy models). `vocabulary`: ids; those above bytes
    and specials are tokens. `ffn_dim`: None for 8/3 of `dim`, rounded up to a multiple of `ffn_multiple`.
    """

    patched: ClassVar[bool] = False

    layers: int = 6
    dim: int = 256
    heads: int = 4
    attention_window: int | None = None
    theta: float = 10_000.0
    ffn_multiple: int = 64
    reset_newline: bool = False
    vocabulary: int = VOCAB
    ffn_dim: int | None = None

    def __post_init__(self) -> None:
        problems = self.stack().problems("model")
        if not VOCAB <= self.vocabulary <= LARGEST:
            problems.append(f"model.vocabulary = {self.vocabulary}: from {VOCAB}, bytes and specials, to {LARGEST}")
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes for the invariant tests, together covering every path of this file."""
        full = cls(layers=2, dim=16, heads=2, ffn_multiple=16)
        return {
            "full": full,
            "windowed": replace(full, attention_window=6, ffn_dim=56),
            "tokens": replace(full, vocabulary=300),
        }

    def stack(self) -> StackConfig:
        """The shape of the one stack."""
        shape = (self.layers, self.dim, self.heads, self.attention_window, self.theta, self.ffn_multiple)
        return StackConfig(*shape, ffn_dim=self.ffn_dim)

    def build(self) -> ByteTransformer:
        """The model, parameters uninitialised."""
        return ByteTransformer(self)


Plan = tuple[Rows, Int[Tensor, "batch new"], CausalPattern]
"""Rows on the host, their ids on the model's device, and the attention pattern."""


@dataclass(frozen=True)
class TransformerState:
    """The position of each row, and the caches of its layers."""

    where: RowPositions
    caches: tuple[Cache, ...]


class ByteTransformer(ByteModel):
    """Embedding, stack, norm, linear: every byte, or token, is a position."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.stack = Stack(config.stack())
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, config.vocabulary)
        self._tokens: Bpe | None = None
        if config.vocabulary > VOCAB:
            self.register_buffer("merges", torch.empty(config.vocabulary - VOCAB, 2, dtype=torch.long))
            self.take_tokens(Bpe.empty(config.vocabulary))
            self.register_load_state_dict_post_hook(lambda model, _: model.take_tokens(model.read_tokens()))

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`."""
        init_weights(self, self.config.layers, seed)

    def take_tokens(self, tokens: Bpe) -> None:
        """See `ByteModel`; the number of ids must be `vocabulary`."""
        with torch.no_grad():
            self.get_buffer("merges").copy_(torch.from_numpy(tokens.merges))
        self._tokens = tokens

    def read_tokens(self) -> Bpe:
        """The tokens of the stored merges."""
        return Bpe(self.get_buffer("merges").cpu().numpy().astype(np.int64))

    @property
    def tokens(self) -> Bpe | None:
        """See `ByteModel`."""
        return self._tokens

    @property
    def vocabulary(self) -> int:
        """See `ByteModel`."""
        return self.config.vocabulary

    def byte_lengths(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """See `ByteModel`."""
        return super().byte_lengths(ids) if self._tokens is None else torch.from_numpy(self._tokens.sizes)[ids]

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`."""
        return self.config.stack().flops(ids) + 2 * ids * self.config.dim * self.config.vocabulary

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """See `ByteModel`."""
        return [Stage("local", self.stack, ids, beside=6 * self.config.dim)]

    def initial_state(self, batch: int) -> TransformerState:
        """See `ByteModel`."""
        return TransformerState(RowPositions.zero(batch), self.stack.initial_state(batch, self.device))

    def plan(
        self, ids: Int[Tensor, "batch new"], state: TransformerState | None = None, boundaries: Any = None
    ) -> Plan:
        """See `ByteModel`."""
        rows = Rows.of(ids)
        begun = state or TransformerState(RowPositions.zero(len(ids)), ())
        starts = rows.starts(begun.where.position)
        if self.config.reset_newline:
            starts = starts | (rows.ids == NEWLINE)
        view = self.stack.view(rows.lengths, starts, begun.where, state.caches if state else None)
        return rows, to_device(rows.ids, self.device), view

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: TransformerState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], TransformerState | None]:
        """See `ByteModel`; `boundaries` are ignored."""
        rows, ids, view = plan or self.plan(ids, state)
        x, kept = self.stack(self.embedding(ids), view, state.caches if state else None)
        logits = self.head(self.norm(x)).float()
        return rows.restore(logits), None if kept is None else TransformerState(view.after, kept)
