"""AdamW with weight decay on matrices and row-wise updates of n-gram tables; learning rate schedule."""

from __future__ import annotations

import abc
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bytelm.interfaces.model import ByteModel, LookupTable
from bytelm.native.training import Rows, call, functions
from bytelm.nn.dtensor import is_dtensor
from bytelm.nn.fused import VECTOR
from bytelm.nn.rows import RowGradients, adam_rows
from bytelm.nn.sharded import rows_here
from bytelm.training.config import TrainConfig
from bytelm.training.dist import SINGLE_PROCESS, DistContext
from bytelm.transfer import to_host

EPSILON = 1e-8


class Part(abc.ABC):
    """Parameters that are updated by one rule: in groups with settings of their own, each with a state.

    In the place of torch's base class, whose first call imports torch's compiler: three seconds for each process that
    trains.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **settings: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [settings | group for group in groups]
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)

    @abc.abstractmethod
    def step(self) -> None:
        """Update the parameters by their gradients."""

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(Part):
    """torch's AdamW (Loshchilov and Hutter, 2019), whose state it has; `fused` where the device has such a kernel."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool) -> None:
        super().__init__(groups, lr=lr)
        self.betas, self.fused = betas, fused

    @torch.no_grad()
    def step(self) -> None:
        """Update those that have a gradient."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.begun(parameter) for parameter in moved]
            adamw(
                moved,
                [parameter.grad for parameter in moved],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=self.fused,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=EPSILON,
                maximize=False,
            )

    def begun(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter."""
        state = self.state[parameter]
        if not state:
            where = parameter.device if self.fused else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


class TableAdam(Part):
    """Adam without momentum for tables; row-wise, with one second moment for each row (`nn.rows.adam_rows`)."""

    def __init__(self, weights: Sequence[Tensor], lr: float, beta2: float, times: float, rowwise: bool) -> None:
        super().__init__([{"params": list(weights), "times": times}], lr=lr, beta2=beta2, eps=EPSILON)
        self.rowwise = rowwise

    def begun(self, parameter: Tensor) -> tuple[Tensor, float]:
        """The second moment of a parameter, and the learning rate of its next step with bias correction."""
        (group,), state = self.param_groups, self.state[parameter]
        width = 1 if self.rowwise else parameter.shape[1]
        if not state:
            state.update(step=0, exp_avg_sq=parameter.new_zeros(len(parameter), width))
        state.pop("exp_avg", None)  # unused, in older checkpoints
        second: Tensor = state["exp_avg_sq"]
        if second.shape[1] != width:  # resumed from the other kind; a mean of averages is the average of means
            second = second.mean(1, keepdim=True) if self.rowwise else second.expand(-1, width).contiguous()
            state["exp_avg_sq"] = second
        state["step"] += 1
        return second, group["lr"] * math.sqrt(1 - group["beta2"] ** state["step"])


class RowAdam(TableAdam):
    """For tables on the host, whose gradients are sparse: in one pass over the rows, if there is a kernel for it."""

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows with a gradient, which must be coalesced."""
        (group,) = self.param_groups
        beta2, eps = group["beta2"], group["eps"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            second, rate = self.begun(parameter)
            index, gradients = parameter.grad._indices()[0].contiguous(), parameter.grad._values().contiguous()
            if functions() is None or parameter.shape[1] % VECTOR:
                adam_rows(parameter, second, index, gradients, rate, beta2, eps)
                continue
            addresses = (x.data_ptr() for x in (index, gradients, parameter, second))
            call("bytelm_adam_rows", Rows(*gradients.shape, *addresses, rate, beta2, eps, self.rowwise))


class BagAdam(TableAdam):
    """For tables on a device, whose gradients are kept per bag (`nn.rows`): no synchronization."""

    def __init__(self, tables: list[LookupTable], lr: float, beta2: float, times: float, rowwise: bool = False) -> None:
        super().__init__([table.weight for table in tables], lr, beta2, times, rowwise)
        self.kept = [RowGradients() for _ in tables]
        for table, kept in zip(tables, self.kept, strict=True):
            table.kept = kept

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows that were read since the last step, after `norm`."""
        (group,) = self.param_groups
        for parameter, kept in zip(group["params"], self.kept, strict=True):
            second, rate = self.begun(parameter)
            kept.move(parameter, second, rate, group["beta2"], group["eps"])

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for kept in self.kept:
            kept.forget()


class Optimizer:
    """AdamW (Loshchilov and Hutter, 2019). Norms and embedding tables are not decayed.

    An embedding row has a gradient only when it is looked up; decay would shrink rare rows to zero.
    n-gram tables, most of a small BLT's parameters, have sparse gradients: a step reads and updates only the rows
    looked up, and the moments of the others are unchanged, as with torch's SparseAdam. They have no momentum: the last
    gradients of a rarely read row are stale, and training is better without (docs/log.md). Those of a table on the
    host, of a model on a device, are clipped by `step`: `norm` does not wait for the device.

    Of a model that several processes share, each moves what it holds; all clip by the same norm.
    """

    def __init__(self, model: ByteModel, config: TrainConfig, dist: DistContext = SINGLE_PROCESS) -> None:
        self.clip, self.dist = config.max_grad_norm, dist
        own = {id(p): p for p in model.parameters() if p.requires_grad}
        device = next(iter(own.values())).device.type
        found = model.lookup_tables()
        self.held = {id(table.weight): table.held for table in found}
        """What this process holds of each table."""
        self.sharded = any(table.held is not table.weight for table in found)
        tables = [self.held[id(own.pop(id(table.weight)))] for table in found]
        embeddings = [
            own.pop(id(m.weight)) for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in own
        ]
        matrices, others = ([p for p in own.values() if (p.ndim > 1) == many] for many in (True, False))
        betas = config.beta1, config.beta2
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": config.weight_decay, "times": 1.0},
            {"params": others, "weight_decay": 0.0, "times": 1.0},
            {"params": embeddings, "weight_decay": 0.0, "times": config.embedding_lr_scale},
        ]
        fused = device in ("cpu", "cuda")
        self.parts: list[Part] = [AdamW([g for g in groups if g["params"]], config.learning_rate, betas, fused)]
        self.tables: TableAdam | None = None
        """The part that moves n-gram tables."""
        self.kept: list[RowGradients] = []
        """Gradients of n-gram tables that are kept per bag."""
        self.host: list[Tensor] = []
        """Gradients on the host that `step` is to clip, by `factor`."""
        self.factor: Tensor | None = None
        rates = config.learning_rate, config.beta2, config.embedding_lr_scale, config.table_optimizer == "rowwise_adam"
        on_host = bool(tables) and tables[0].device.type == "cpu"
        if on_host:
            for table in found:
                table.sparse = True
            self.tables = RowAdam(tables, *rates)
            self.parts.append(self.tables)
        self.parameters = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        """All parameters with a dense or sparse gradient."""
        if tables and not on_host:
            self.tables = bags = BagAdam(found, *rates)
            self.parts.append(bags)
            self.kept = bags.kept

    def share(self) -> None:
        """Sum the gradients of tables that each process holds whole; all others are summed by the backward pass."""
        if self.dist.world == 1 or self.sharded:
            return
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = self.dist.add_sparse(parameter.grad)
        for kept in self.kept:
            kept.index, kept.gradients = (
                [self.dist.everyones(x) for x in some] for some in (kept.index, kept.gradients)
            )

    def norm(self) -> Tensor:
        """The global gradient norm; gradients are clipped to `clip`. Does not synchronize."""
        dense, rows = list[Tensor](), list[Tensor]()
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = each_once(parameter.grad)
                rows.append(parameter.grad._values())
            elif parameter.grad is not None:
                dense.append(parameter.grad)
        norm = self.norm_of(dense, [*rows, *(kept.norm() for kept in self.kept)])
        factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        held = [*(rows_here(gradient)[1] for gradient in dense), *rows]
        own = [g for g in held if g.device.type == factor.device.type]
        self.host, self.factor = [g for g in held if g.device.type != factor.device.type], factor
        gradients = [part for kept in self.kept for part in kept.gradients]
        torch._foreach_mul_([*own, *gradients], factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def norm_of(self, dense: list[Tensor], tables: list[Tensor]) -> Tensor:
        """The norm of gradients over all processes. A DTensor's is so by itself; of tables the squares are added."""
        total = torch.nn.utils.get_total_norm
        if self.dist.world == 1:
            return total([*dense, *tables])
        norm = total(dense)
        norm = norm.full_tensor() if is_dtensor(norm) else norm
        if not self.held:
            return norm
        squares = total(tables).square() if tables else norm.new_zeros(())
        if self.sharded:
            self.dist.add(squares)
        return (norm.square() + squares.to(norm.device)).sqrt()

    def step(self, rate: float) -> None:
        """Apply one optimizer step, after `norm`."""
        for gradient in self.host:
            assert self.factor is not None
            gradient.mul_(to_host(self.factor))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["times"]
            part.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.host = []
        for part in self.parts:
            part.zero_grad()

    def moments(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer state of a parameter; mutable."""
        held = self.held.get(id(parameter), parameter)
        (part,) = (p for p in self.parts if any(q is held for group in p.param_groups for q in group["params"]))
        return part.state[held]


def each_once(gradient: Tensor) -> Tensor:
    """A coalesced sparse gradient, unchanged if its rows are unique: autograd drops that flag."""
    rows = gradient._indices()[0]
    return gradient._coalesced_(True) if bool((rows[1:] > rows[:-1]).all()) else gradient.coalesce()


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """The learning rate at a step (from 0 on), when `fraction` of the run's budget is used up.

    Warm-up, then a line (Bergsma et al. 2025, "Straight to Zero", arXiv 2502.15938).
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = 1 - min(1.0, fraction)
    return config.learning_rate * warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
