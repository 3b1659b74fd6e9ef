"""The interface of every architecture: `model(ids, state) -> (logits, state)`."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bytelm.data.bpe import Bpe, Tokens
from bytelm.nn.rows import RowGradients
from bytelm.nn.transformer import Stack
from bytelm.patching.base import Patcher
from bytelm.units import BYTES, VOCAB


@dataclass(frozen=True)
class Stage:
    """A stack of a model, and the positions it processes; for estimates of memory and FLOPs."""

    name: Literal["global", "local"]
    """Over patches, or over bytes and inside patches."""
    stack: Stack
    positions: int
    beside: int = 0
    """Bytes of activations saved per position, in addition to those of the stack."""
    piece: int | None = None
    """Positions recomputed together through all layers; None if layers are recomputed one by one."""
    plain: int = 0
    """Further bytes in addition to the stack if torch's kernels compute instead of ours."""
    apart: int | None = None
    """Positions of one attention block, as a patch; None if all of a row may attend to each other."""


@runtime_checkable
class LookupTable(Protocol):
    """An embedding table of which a byte reads few rows."""

    sparse: bool
    """Whether its gradient is sparse: only the rows that were looked up."""
    kept: RowGradients | None
    """Where its gradients are collected for an optimizer that reads them there; None for a parameter gradient."""
    on_host: bool
    """Whether its weight stays on the host when the model is moved to a device."""

    @property
    def weight(self) -> Tensor:
        """`[rows, dim]`; a DTensor where it is sharded."""
        ...

    @property
    def held(self) -> Tensor:
        """What this process holds of it: what an optimizer trains."""
        ...

    def shard(self, mesh: DeviceMesh) -> None:
        """Hold some of the rows, on the device of a mesh of one dimension; without values yet."""
        ...

    @property
    def lookups(self) -> int:
        """Rows that a byte looks up."""
        ...


@dataclass(frozen=True)
class Chunking:
    """The boundaries that a model has learnt to decide, in one pass."""

    depth: Int[Tensor, "batch new"]
    """In how many stages each id opens a patch, on the host: 0 in none, 1 in the first."""
    counts: tuple[Int[Tensor, " batch"], ...]
    """Patches that open in each row, on the host; then those of patches, if there are further stages."""
    auxiliary: Float[Tensor, ""] | None
    """What training adds to the nats of this pass: a loss times ids, summed over rows; None after a state."""

    @property
    def opens(self) -> Bool[Tensor, "batch new"]:
        """Whether each id opens a patch."""
        return self.depth > 0


class ByteModel(nn.Module, abc.ABC):
    """`logits[:, t]` scores `ids[:, t + 1]`. Training, evaluation, generation and serving all call it, and only it.

    A document starts with BOS, so that each of its bytes is scored exactly once. PAD ids are positions that do not
    exist: wherever they are in a row, other positions are unchanged by them; the logits at a PAD are undefined. A row
    may consist of PADs only: its state is then unchanged.
    """

    config: Any = None
    """What built it; None for a wrapper."""
    patch_sizes: tuple[int, ...] = ()
    """The factors of a fixed patch size, outermost first; patches count from the start of a document."""

    target_patch: float | None = None
    """Mean bytes per patch at which training aims, of a model that learns its boundaries; None for others."""

    def __init__(self) -> None:
        super().__init__()
        self.patcher: Patcher | None = None
        """What decides boundaries; None for fixed patches, or none."""
        self.quantization: Literal["bf16", "int8"] | None = None
        """Of linear layers that were packed for inference (`checkpoint.packed`); None for ordinary ones."""
        self.chunking: Chunking | None = None
        """Of the newest pass, if the model learns its boundaries."""
        self.content: Callable[[], bytes] | None = None
        """A hash of weights that were packed; None where parameters have memory of their own."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: not what the newest pass decided, which holds the graph of that pass."""
        return {**self.__dict__, "chunking": None}

    @abc.abstractmethod
    def init_weights(self, seed: int) -> None:
        """Set every trainable parameter from `seed`."""

    @abc.abstractmethod
    def initial_state(self, batch: int) -> Any:
        """The initial state of `batch` rows."""

    @abc.abstractmethod
    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: Any = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], Any]:
        """Read `ids` after what `state` has read, and return the logits and the state to continue from.

        With `state=None` (training) the returned state is None. A state is immutable, and may be continued from more
        than once. `boundaries[:, t]` says that the byte after `ids[:, t]` starts a patch, if that was recorded before;
        otherwise the patcher decides. The patcher does not read ids with given boundaries, so that a row which was
        given boundaries must be given them to its end.

        Ids, boundaries and the integers of a state are on the host, logits on the device of the weights: ids on a
        device are fetched, with one synchronisation (`bytelm.transfer`). A model that makes plans also accepts its plan
        for the same ids, state and boundaries, as `plan`.
        """

    def plan(self, ids: Int[Tensor, "batch new"], state: Any = None, boundaries: Any = None) -> Any:
        """All that `forward` derives on the host, so that it can be made a step ahead; None if the model makes none."""
        return None

    @abc.abstractmethod
    def flops(self, ids: int, patches: int) -> int:
        """FLOPs of the matmuls of one row over `ids` ids from an empty state, completing `patches`, BOS's included.

        As executed: masked parts of attention count; embeddings, elementwise work and the patcher do not. Times 3 for a
        training step.
        """

    def stages(self, ids: int, patches: int) -> list[Stage]:
        """The stacks, and the positions that each processes for one row of so many ids and patches."""
        return []

    def blocks(self) -> list[nn.Module]:
        """The layers that are compiled one by one, each with an attribute `dropout`."""
        return [block for stage in self.stages(1, 1) for block in stage.stack.blocks]

    def units(self) -> list[nn.Module]:
        """What is gathered and freed one by one where several processes share the weights (FSDP2).

        Every pass of a training enters all of them by their `forward`, in an order that does not depend on the ids:
        processes that entered others would wait for each other for ever.
        """
        return [block for stage in self.stages(1, 1) if stage.piece is None for block in stage.stack.blocks]

    def set_dropout(self, chance: float) -> None:
        """Set the dropout probability of training."""
        for block in self.blocks():
            setattr(block, "dropout", chance)  # noqa: B010  # pyright takes attributes of modules for modules

    def lookup_tables(self) -> list[LookupTable]:
        """Embedding tables whose gradients are kept by row."""
        return []

    def output_weights(self) -> list[nn.Parameter]:
        """What makes logits of states: by default the linear layers as wide as the logits, outside of the patcher."""
        parts = [part for name, part in self.named_modules() if not name.startswith("patcher.")]
        layers = [part for part in parts if isinstance(part, nn.Linear) and part.out_features == self.vocabulary]
        return [parameter for layer in layers for parameter in layer.parameters()]

    @property
    def patch_size(self) -> int | None:
        """Bytes of a fixed patch; None for other patches, or none."""
        return math.prod(self.patch_sizes) if self.patch_sizes else None

    @property
    def tokens(self) -> Tokens | None:
        """The tokens of a model over tokens; None for a model over bytes."""
        return None

    def take_tokens(self, tokens: Bpe) -> None:
        """Set the tokens. Only for a model that has `tokens`."""
        raise NotImplementedError(f"{type(self).__name__} reads bytes, not tokens")

    @property
    def vocabulary(self) -> int:
        """The width of the logits: all ids, specials included."""
        return VOCAB

    def byte_lengths(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The number of bytes of each id: 1 for a byte, 0 for a special."""
        return (ids < BYTES).long()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device
