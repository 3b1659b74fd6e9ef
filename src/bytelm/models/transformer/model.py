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
from bytelm.interfaces.model import ByteModel, LookupTable, Stage
from bytelm.nn.attention import Cache, CausalPattern, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.ngrams import NgramEmbedding, table_problems
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

    The hashed n-grams of BLT, here of ids: `ngram_sizes`, each with a table of `ngram_rows` rows, are added to the
    vectors of ids; with `ngram_output` rows are twice as wide, and second halves are added before the last norm.
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
    ngram_sizes: tuple[int, ...] = ()
    ngram_rows: int = 8192
    ngram_output: bool = False

    def __post_init__(self) -> None:
        problems = self.stack().problems("model")
        problems += table_problems(self.ngram_sizes, self.ngram_rows, self.ngram_output)
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
            "n-grams": replace(full, attention_window=6, ngram_sizes=(2, 4), ngram_rows=101, ngram_output=True),
            "tokens, n-grams": replace(full, vocabulary=300, ngram_sizes=(2, 3), ngram_rows=101),
        }

    def stack(self) -> StackConfig:
        """The shape of the one stack."""
        shape = (self.layers, self.dim, self.heads, self.attention_window, self.theta, self.ffn_multiple)
        return StackConfig(*shape, ffn_dim=self.ffn_dim)

    def build(self) -> ByteTransformer:
        """The model, parameters uninitialised."""
        return ByteTransformer(self)


@dataclass(frozen=True)
class Plan:
    """What is derived from ids on the host."""

    rows: Rows
    ids: Int[Tensor, "batch new"]
    """On the model's device."""
    view: CausalPattern
    starts: Bool[Tensor, "batch new"]
    """Where documents start."""
    hashes: Int[Tensor, "batch new tables"] | None
    """Rows of n-gram tables that stay on the host."""


@dataclass(frozen=True)
class TransformerState:
    """The position of each row, the caches of its layers, and the ids that later n-grams reach."""

    where: RowPositions
    caches: tuple[Cache, ...]
    recent: Int[Tensor, "batch reach"]


class ByteTransformer(ByteModel):
    """Embedding, stack, norm, linear: every byte, or token, is a position."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        tables = config.ngram_sizes, 1, config.ngram_rows, 1 + config.ngram_output, config.vocabulary
        self.embedding = (
            NgramEmbedding(config.dim, *tables) if config.ngram_sizes else nn.Embedding(config.vocabulary, config.dim)
        )
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
    def ngrams(self) -> NgramEmbedding | None:
        """The embedding, where it has n-grams."""
        return self.embedding if isinstance(self.embedding, NgramEmbedding) else None

    @property
    def vectors(self) -> Tensor:
        """The vectors of ids `[vocabulary, dim]`."""
        return self.embedding.byte.weight if isinstance(self.embedding, NgramEmbedding) else self.embedding.weight

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
        tables = 0 if self.ngrams is None else 8 * self.ngrams.lookups + 4 * (self.ngrams.parts - 1) * self.config.dim
        return [Stage("local", self.stack, ids, beside=6 * self.config.dim + tables)]

    def set_dropout(self, chance: float) -> None:
        """See `ByteModel`; of n-grams too."""
        super().set_dropout(chance)
        if self.ngrams is not None:
            self.ngrams.dropout = chance

    def lookup_tables(self) -> list[LookupTable]:
        """See `ByteModel`."""
        return [] if self.ngrams is None else [self.ngrams]

    def initial_state(self, batch: int) -> TransformerState:
        """See `ByteModel`."""
        caches = self.stack.initial_state(batch, self.device)
        return TransformerState(RowPositions.zero(batch), caches, self.nothing_read(batch))

    def nothing_read(self, batch: int) -> Int[Tensor, "batch reach"]:
        """The ids that n-grams reach before the first."""
        return torch.zeros(batch, 0, dtype=torch.long) if self.ngrams is None else self.ngrams.initial_state(batch)

    def plan(
        self, ids: Int[Tensor, "batch new"], state: TransformerState | None = None, boundaries: Any = None
    ) -> Plan:
        """See `ByteModel`."""
        rows = Rows.of(ids)
        where = state.where if state else RowPositions.zero(len(ids))
        recent = state.recent if state else self.nothing_read(len(ids))
        starts = rows.starts(where.position)
        lines = starts | (rows.ids == NEWLINE) if self.config.reset_newline else starts
        view = self.stack.view(rows.lengths, lines, where, state.caches if state else None)
        hashes = None if self.ngrams is None else self.ngrams.hashes_on_host(rows.ids, starts, recent)
        return Plan(rows, to_device(rows.ids, self.device), view, starts, hashes)

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: TransformerState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], TransformerState | None]:
        """See `ByteModel`; `boundaries` are ignored."""
        plan = plan or self.plan(ids, state)
        recent = state.recent if state else self.nothing_read(len(ids))
        x, beyond = self.embedded(plan, recent)
        x, kept = self.stack(x, plan.view, state.caches if state else None)
        logits = plan.rows.restore(self.head(self.norm(x if beyond is None else x + beyond)).float())
        if kept is None:
            return logits, None
        reached = recent if self.ngrams is None else self.ngrams.reached(plan.rows, plan.starts, recent)
        return logits, TransformerState(plan.view.after, kept, reached)

    def embedded(
        self, plan: Plan, recent: Int[Tensor, "batch reach"]
    ) -> tuple[Float[Tensor, "batch new dim"], Float[Tensor, "batch new dim"] | None]:
        """Vectors of new ids, and what their n-grams add to outputs, if anything."""
        if self.ngrams is None:
            return self.embedding(plan.ids), None
        there = (to_device(x, self.device) for x in (plan.starts, recent))
        x, *beyond = self.ngrams(plan.ids, *there, plan.hashes).split(self.config.dim, -1)
        return x, beyond[0] if beyond else None
