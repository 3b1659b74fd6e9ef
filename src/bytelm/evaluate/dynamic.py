"""Dynamic evaluation: the network's weights learn what was read (Mikolov et al. 2010; Krause et al. 2018).

    window 0     reads  BOS a b c        scores  a b c d     weights as they were trained
                 one step of the optimizer on -log p of a b c d
    window 1     reads  . . c d          scores  e f         weights that have learned a b c d
                 one step on -log p of e f, and so on, from document to document

Every byte is scored by weights that have learned nothing of it and of what follows it, so that the bits are those of a
code. Windows are those of `evaluate.bits`: the stride is the number of bytes between two steps. What learns is a copy.
Patch boundaries stay those of the patcher and its entropy model, which do not learn.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.errors import UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import nats_of
from bytelm.nn.rows import adam_rows
from bytelm.transfer import to_device

Learning = Literal["head", "tables", "all"]

RATE = 1e-3  # by which a step moves a weight at the most, or nearly; docs/online.md has what others give
TABLES = 10.0  # times that for rows of n-gram tables, of which a step moves few
BETA2, EPS = 0.99, 1e-8


@dataclass
class Moving:
    """A parameter that learns."""

    parameter: nn.Parameter
    second: Tensor
    """The second moment of its gradients; of a table one number for each row, the mean over the row."""
    times: float
    """The rate it learns by, in rates."""


class Dynamic:
    """A copy of a model, some of whose weights learn; the model stays as it is. Not for several threads at once."""

    def __init__(self, model: ByteModel, learning: Learning = "all", rate: float = RATE) -> None:
        """`learning`: the output layer ("head"), n-gram tables and the output layer ("tables"), or "all" weights.

        `rate`: the step size; 0 learns nothing. Raises UsageError for a model that cannot learn: packed for inference,
        below float32, on a GPU, without such weights.
        """
        self.source, self.rate, self.steps = model, rate, 0
        self.learning: Learning = learning
        if not self.rate >= 0:
            raise UsageError(f"rate {self.rate} of dynamic evaluation: must be at least 0")
        chosen = chosen_of(model, learning)
        with torch.inference_mode(False):
            self.model = copied(model, chosen)
        for table in self.model.lookup_tables():
            table.sparse = True
        tables = {id(table.weight) for table in self.model.lookup_tables()}
        self.moving = [
            Moving(p, p.new_zeros(len(p), 1), TABLES) if id(p) in tables else Moving(p, torch.zeros_like(p), 1.0)
            for p in self.model.parameters()
            if p.requires_grad
        ]

    def copy_of(self, model: ByteModel) -> ByteModel:
        """The copy, of the model that it was made of. Raises UsageError for another one."""
        if model is not self.source:
            raise UsageError("dynamic evaluation of another model than the one given: make a Dynamic of this one")
        return self.model

    @property
    def copied_bytes(self) -> int:
        """Memory of the weights that learn, which are held twice."""
        return sum(moving.parameter.nbytes for moving in self.moving)

    @property
    def state_bytes(self) -> int:
        """Memory of the optimizer's state."""
        return sum(moving.second.nbytes for moving in self.moving)

    def learn(self, logits: Float[Tensor, "scored vocab"], targets: Int[Tensor, " scored"]) -> None:
        """One step on the mean -log p of ids, by the logits of a pass of the copy with gradients."""
        loss = nats_of(logits[None], to_device(targets, logits)[None]).mean()
        own = [moving.parameter for moving in self.moving]
        gradients = cast("tuple[Tensor | None, ...]", torch.autograd.grad(loss, own, allow_unused=True))
        self.steps += 1
        for moving, gradient in zip(self.moving, gradients, strict=True):
            if gradient is not None:
                self.move(moving, gradient)

    @torch.no_grad()
    def move(self, moving: Moving, gradient: Tensor) -> None:
        """second = β2 · second + (1 - β2) · gradient²; weight -= rate · √(1 - β2^steps) · gradient / √second.

        That is Adam (Kingma and Ba 2015) without momentum, from a state of zeros.
        """
        parameter, second = moving.parameter, moving.second
        rate = self.rate * moving.times * math.sqrt(1 - BETA2**self.steps)
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            adam_rows(parameter, second, gradient.indices()[0], gradient.values(), rate, BETA2, EPS)
        else:
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            parameter.addcdiv_(gradient, second.sqrt().add_(EPS), value=-rate)


def chosen_of(model: ByteModel, learning: Learning) -> set[int]:
    """The ids of the parameters that learn. Raises UsageError where there are none, or they cannot."""
    if model.device.type != "cpu":
        raise UsageError(f"dynamic evaluation on {model.device} would not give the same bits twice: take --device cpu")
    if model.content is not None or model.quantization is not None:
        raise UsageError("this model was packed for inference and cannot learn: load it without weights and tables")
    own = [p for p in model.parameters() if p.requires_grad]
    low = {p.dtype for p in own} - {torch.float32, torch.float64}
    if low:
        raise UsageError(f"weights in {low.pop()} are too coarse to learn: load the model in float32")
    head = [p for p in model.output_weights() if p.requires_grad]
    tables = [table.weight for table in model.lookup_tables()]
    found: list[Any] = {"head": head, "tables": [*tables, *head], "all": own}[learning]
    if learning == "tables" and not tables:
        raise UsageError(f"{type(model).__name__} has no n-gram tables to learn: take head or all")
    if not found:
        raise UsageError(f"{type(model).__name__} has no parameters that {learning} names: take all")
    return {id(p) for p in found}


def copied(model: ByteModel, chosen: set[int]) -> ByteModel:
    """A copy with parameters of its own where they are chosen, and all others shared and without gradients."""
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        if id(parameter) in chosen:
            known[id(parameter)] = nn.Parameter(parameter.detach().clone())
        else:
            known[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, known).eval()
