"""H-Net (Hwang et al. 2025, arXiv 2507.07955): bytes → chunks that the model learns to cut → bytes, one stage or more.

    bytes      T h e _ c a t          embedding, encoder: a windowed Transformer                 E
               |     | |              `chunking`: the encoder's outputs where a chunk opens
    chunks     T     _ c              the inner network: again such a stage, or a Transformer    M
               z0z0z0z1z2z2z2         smoothed, read by each byte, the encoder's outputs added
    bytes      T h e _ c a t          decoder: a windowed Transformer                            D

All networks end with a norm. Attention is in place of the paper's state-space layers; published checkpoints have these
(`layers`). A chunk enters the inner network with its first byte, so that nothing is held back, and reading
incrementally is the same computation as reading at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.interfaces.model import ByteModel, Chunking, LookupTable, Stage
from bytelm.models.hnet.layers import Published
from bytelm.models.hnet.stage import ChunkingStage, Innermost, StageState
from bytelm.nn.attention import CausalPattern, RowPositions
from bytelm.nn.init_weights import init_weights
from bytelm.nn.ngrams import NgramEmbedding, table_problems
from bytelm.nn.products import Linear
from bytelm.nn.transformer import StackConfig
from bytelm.patching.layout import Rows
from bytelm.transfer import to_device
from bytelm.units import VOCAB


@dataclass(frozen=True)
class Config:
    """Shape of an H-Net: lists have a value per network, outermost first; `dims` and `heads` end with the innermost.

    `ratios`: the mean length of a chunk at each stage, in positions of that stage, at which training aims.
    `ratio_weight`: of the ratio loss (the paper's alpha). `attention_window`: of encoders and decoders, in positions.

    Beyond the paper, the hashed n-grams of BLT: `ngram_sizes`, each with a table of `ngram_rows` rows, are added to the
    vectors of bytes; with `ngram_output` rows are twice as wide, and second halves are added before the last norm.

    `published`: layers as published checkpoints have them, for which the other counts of layers, `attention_window` and
    `ffn_multiple` say nothing; also their smoothing, and biases of the residual and the logits.
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
    ngram_sizes: tuple[int, ...] = ()
    ngram_rows: int = 8192
    ngram_output: bool = False
    published: Published | None = None

    def __post_init__(self) -> None:
        stages, problems = len(self.ratios), list[str]()
        depths = {} if self.published else {"encoder_layers": 0, "decoder_layers": 0}
        for name, expected in {"dims": 1, "heads": 1, **depths}.items():
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
        problems += table_problems(self.ngram_sizes, self.ngram_rows, self.ngram_output)
        if self.published:
            problems += self.published.problems(stages + 1)
            for name in ("encoder_layers", "decoder_layers", "layers", "attention_window", "ffn_multiple"):
                if (given := getattr(self, name)) != getattr(type(self), name):
                    problems.append(f"model.{name} = {given}: model.published says it: leave it out")
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
        two = replace(
            one, dims=(16, 16, 24), heads=(2, 2, 2), encoder_layers=(2, 1), decoder_layers=(1, 1), ratios=(2.0, 1.5)
        )
        tables = replace(two, ngram_sizes=(2, 5), ngram_rows=101, ngram_output=True)
        layers = ("m1", "t1M1", "T1", "m1T1", "m1")
        mixed = Published(layers, (0, 40, 48), (0, 4, 8), (6, 5, 0), states=6, state_head_dim=8)
        published = cls((16, 16, 24), (2, 2, 2), ratios=(2.0, 1.5), theta=100.0, published=mixed)
        return {"one stage": one, "two stages, n-grams": tables, "published": published}

    def encoder(self, stage: int) -> StackConfig:
        """The shape of a stage's encoder."""
        if self.published:
            return self._published(self.published, stage, stage)
        return self._stack(self.encoder_layers[stage], stage, self.attention_window)

    def decoder(self, stage: int) -> StackConfig:
        """The shape of a stage's decoder."""
        if self.published:
            return self._published(self.published, 2 * len(self.ratios) - stage, stage)
        return self._stack(self.decoder_layers[stage], stage, self.attention_window)

    def innermost(self) -> StackConfig:
        """The shape of the innermost network."""
        if self.published:
            return self._published(self.published, len(self.ratios), len(self.ratios))
        return self._stack(self.layers, len(self.ratios), None)

    def _stack(self, layers: int, stage: int, window: int | None) -> StackConfig:
        return StackConfig(layers, self.dims[stage], self.heads[stage], window, self.theta, self.ffn_multiple)

    def _published(self, published: Published, place: int, width: int) -> StackConfig:
        return published.stack(place, width, self.dims[width], self.heads[width], self.theta)

    def depth(self) -> int:
        """Layers of all networks."""
        stages = range(len(self.ratios))
        return self.innermost().layers + sum(self.encoder(s).layers + self.decoder(s).layers for s in stages)

    def positions(self, ids: int, patches: int) -> list[int]:
        """Positions of each network, outermost first, for so many ids and chunks of the first stage."""
        found = [ids, patches]
        for ratio in self.ratios[1:]:
            found.append(max(1, round(found[-1] / ratio)))
        return found

    def build(self) -> HNet:
        """The model, parameters uninitialised."""
        return HNet(self)


@dataclass(frozen=True)
class Plan:
    """What is derived from ids on the host."""

    rows: Rows
    ids: Int[Tensor, "batch new"]
    """On the model's device."""
    starts: Bool[Tensor, "batch new"]
    """Where documents start."""
    view: CausalPattern
    """The attention pattern of bytes."""
    hashes: Int[Tensor, "batch new tables"] | None
    """Rows of n-gram tables that stay on the host."""


@dataclass(frozen=True)
class HNetState:
    """What rows have read."""

    recent: Int[Tensor, "batch reach"]
    """The ids that later n-grams reach."""
    stage: StageState


class HNet(ByteModel):
    """Embedding, the outermost stage, linear."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.target_patch = config.ratios[0]
        self.embed = NgramEmbedding(config.dims[0], config.ngram_sizes, 1, config.ngram_rows, 1 + config.ngram_output)
        self.stage = ChunkingStage(config, 0)
        self.head = nn.Linear(config.dims[0], VOCAB) if config.published else Linear(config.dims[0], VOCAB)
        if config.published:
            self.head.bias.requires_grad_(False)  # theirs has none: ours keeps ids apart that theirs does not have

    def chunking_stages(self) -> list[ChunkingStage]:
        """The stages, outermost first."""
        return [part for part in self.modules() if isinstance(part, ChunkingStage)]

    @property
    def innermost(self) -> Innermost:
        """The innermost network."""
        return next(part for part in self.modules() if isinstance(part, Innermost))

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`; residual branches are counted through all networks, as in the paper's code lineage."""
        init_weights(self, self.config.depth(), seed)
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
        """See `ByteModel`. In addition to the stacks: rows of tables, norms, router, chunks as read, the residual."""
        *outer, innermost = self.config.positions(ids, patches)
        found = [Stage("global", self.innermost.stack, innermost, beside=40 * self.config.dims[-1])]
        tables, output = 8 * self.embed.lookups, 4 * (self.embed.parts - 1) * self.config.dims[0]
        for stage, positions in zip(self.chunking_stages(), outer, strict=True):
            dim = stage.encoder.config.dim
            found.append(Stage("local", stage.encoder, positions, beside=30 * dim + tables))
            found.append(Stage("local", stage.decoder, positions, beside=20 * dim + output))
            tables = output = 0  # of bytes alone
        return found

    def set_dropout(self, chance: float) -> None:
        """See `ByteModel`; of n-grams too."""
        super().set_dropout(chance)
        self.embed.dropout = chance

    def lookup_tables(self) -> list[LookupTable]:
        """See `ByteModel`."""
        return [] if self.embed.ngram is None else [self.embed]

    def initial_state(self, batch: int) -> HNetState:
        """See `ByteModel`."""
        return HNetState(self.embed.initial_state(batch), self.stage.initial_state(batch))

    def plan(self, ids: Int[Tensor, "batch new"], state: HNetState | None = None, boundaries: Any = None) -> Plan:
        """See `ByteModel`."""
        rows = Rows.of(ids)
        where = state.stage.where if state else RowPositions.zero(len(ids))
        starts = rows.starts(where.position)
        view = self.stage.view(rows.lengths, starts, state.stage if state else None)
        recent = state.recent if state else self.embed.initial_state(len(ids))
        return Plan(
            rows, to_device(rows.ids, self.device), starts, view, self.embed.hashes_on_host(rows.ids, starts, recent)
        )

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: HNetState | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], HNetState | None]:
        """See `ByteModel`; `boundaries` are ignored."""
        plan = plan or self.plan(ids, state)
        begun, rows = self.initial_state(len(ids)) if state is None else state, plan.rows
        there = (to_device(x, self.device) for x in (plan.starts, begun.recent))
        x, *beyond = self.embed(plan.ids, *there, plan.hashes).split(self.config.dims[0], -1)
        found = self.stage(x, rows.lengths, plan.starts, begun.stage, state is not None, plan.view, *beyond)
        logits = self.head(found.outputs).float()
        auxiliary = None if state else self.auxiliary(found.loss, rows.lengths)
        self.chunking = Chunking(rows.restore(found.depth), found.counts, auxiliary)
        after = HNetState(self.embed.reached(rows, plan.starts, begun.recent), found.state) if state else None
        return rows.restore(logits), after

    def auxiliary(self, loss: Any, lengths: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """See `Chunking`: the ratio losses of rows, weighted."""
        return self.config.ratio_weight * (loss * to_device(lengths, self.device)).sum()
