"""The one interface of every architecture: `model(ids, state) -> (logits, state)`."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.data.bpe import Bpe
from bytelm.nn.rows import RowGradients
from bytelm.nn.transformer import Stack
from bytelm.patching.base import Patcher
from bytelm.units import BYTES, VOCAB


@dataclass(frozen=True)
class Stage:
    """A part of a model: its layers, and where they work."""

    name: Literal["global", "local"]
    """Over patches or over bytes; what is inside patches is local."""
    stack: Stack
    positions: int
    beside: int = 0
    """Bytes that are kept at each position until its gradient is taken, besides those of the stack itself."""
    piece: int | None = None
    """Positions that are recomputed together, all layers at once; None where layers are, one by one."""
    plain: int = 0
    """Bytes more beside the stack where torch's kernels compute instead of ours."""
    apart: int | None = None
    """Positions that attend among themselves alone, as those of one patch do; None where all of a row may."""


@runtime_checkable
class LookupTable(Protocol):
    """A table of which a byte reads few rows."""

    sparse: bool
    """Whether its gradient is to hold only the rows that were looked up, for optimizers that take such."""
    kept: RowGradients | None
    """Where its gradients go, for an optimizer that takes them from there; None for a gradient of its own."""

    @property
    def weight(self) -> Tensor:
        """`[rows, dim]`."""
        ...


class ByteModel(nn.Module, abc.ABC):
    """`logits[:, t]` scores `ids[:, t + 1]`. Training, evaluation, generation and serving all call it, and only it.

    A document starts with BOS, so that every byte of it is scored exactly once. PAD ids are positions that do not
    exist: wherever they stand in a row, the other positions are as if the row had been given without them; the
    logits at a PAD mean nothing. A row may be given nothing but PADs: its state stays as it is.
    """

    config: Any = None
    """What built it; None for a model around another one."""
    patch_sizes: tuple[int, ...] = ()
    """Where patches are counted from the start of a document: what their size is the product of, outermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.patcher: Patcher | None = None
        """What cuts patches; None for a model that counts them, or reads none."""

    @abc.abstractmethod
    def init_weights(self, seed: int) -> None:
        """Set every trainable parameter from `seed`."""

    @abc.abstractmethod
    def initial_state(self, batch: int) -> Any:
        """The state of `batch` rows that have read nothing yet."""

    @abc.abstractmethod
    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: Any = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], Any]:
        """Read `ids` after what `state` has read, and return the logits and the state to continue from.

        With `state=None` nothing is kept (training): the returned state is None. A state is never written to, so it
        may be continued from more than once. `boundaries[:, t]` says that the byte after `ids[:, t]` opens a patch,
        where that was decided and recorded before; without it the model's patcher decides. The patcher does not read
        what it is not asked about: a row that was given boundaries is given them to its end.

        Ids, boundaries and the whole numbers of a state are on the host, logits where the weights are: what is given on
        a device is fetched, which waits for it once (`bytelm.transfer`). A model that makes plans also takes the one
        that it made of the same ids, state and boundaries, as `plan`.
        """

    def plan(self, ids: Int[Tensor, "batch new"], state: Any = None, boundaries: Any = None) -> Any:
        """All that `forward` derives on the host before it computes: made a step ahead, it costs a GPU no time.

        None for a model that makes no plans, which is the default.
        """
        return None

    @abc.abstractmethod
    def flops(self, ids: int, patches: int) -> int:
        """Floating-point operations of the matrix products when one row reads `ids` ids at once, from nothing.

        `patches` of them close meanwhile, BOS's own among them. What is executed is counted: masked parts of attention
        are, embeddings, elementwise work and the patcher are not. Times 3 for a training step.
        """

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """The stacks of layers, and at how many positions each works when one row reads so many ids and patches."""
        return []

    def blocks(self) -> list[nn.Module]:
        """The layers that are compiled one by one, and drop out by their attribute `dropout`."""
        return [block for stage in self.stages(1, 1) for block in stage.stack.blocks]

    def set_dropout(self, chance: float) -> None:
        """Leave out this share of activations in training."""
        for block in self.blocks():
            setattr(block, "dropout", chance)  # noqa: B010  # pyright takes attributes of modules for modules

    def lookup_tables(self) -> list[LookupTable]:
        """Tables of which a byte reads few rows: their gradients are kept by row."""
        return []

    @property
    def patch_size(self) -> int | None:
        """Bytes of a patch, where patches are counted; None where they are not."""
        return math.prod(self.patch_sizes) if self.patch_sizes else None

    @property
    def tokens(self) -> Bpe | None:
        """What a model reads that does not read bytes: the ids of these tokens. None for every model of bytes."""
        return None

    def take_tokens(self, tokens: Bpe) -> None:
        """Read these tokens from now on. Only a model that has `tokens` can."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """Ids that the model knows, specials included: the width of its logits."""
        return VOCAB

    def byte_lengths(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The bytes that each id stands for: one for a byte, none for a special."""
        return (ids < BYTES).long()

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device
