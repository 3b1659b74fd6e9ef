"""AdamW with weight decay on matrices and row-wise updates of n-gram tables; learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bytelm.interfaces.model import ByteModel, LookupTable
from bytelm.native.training import Rows, call, functions
from bytelm.nn.fused import VECTOR
from bytelm.nn.rows import RowGradients
from bytelm.training.config import TrainConfig
from bytelm.training.dist import DistContext


class RowAdam(torch.optim.SparseAdam):
    """SparseAdam in one pass over the rows, if there is a kernel for it."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the rows with a gradient, which must be coalesced."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for state in (self.state[p] for p, _ in pairs if self.state[p]):
            if "exp_avg" not in state:  # resumed from a GPU run: see `BagAdam`
                state["exp_avg"] = torch.zeros_like(state["exp_avg_sq"])
        if functions() is None or any(p.device.type != "cpu" or p.shape[1] % VECTOR for p, _ in pairs):
            super().step()
            return
        for parameter, group in pairs:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
            index, gradients = parameter.grad._indices()[0].contiguous(), parameter.grad._values().contiguous()
            tensors = (index, gradients, parameter, state["exp_avg"], state["exp_avg_sq"])
            addresses = (x.data_ptr() for x in tensors)
            call("bytelm_adam_rows", Rows(*gradients.shape, *addresses, rate, beta1, beta2, group["eps"]))


class BagAdam(torch.optim.Optimizer):
    """`RowAdam` without momentum, for gradients kept per bag (`nn.rows`): no synchronization."""

    def __init__(self, tables: list[LookupTable], lr: float, beta2: float, times: float) -> None:
        weights = [table.weight for table in tables]
        super().__init__([{"params": weights, "times": times}], {"lr": lr, "beta2": beta2, "eps": 1e-8})
        self.kept = [RowGradients() for _ in weights]
        for table, kept in zip(tables, self.kept, strict=True):
            table.kept = kept

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the rows that were read since the last step, after `norm`."""
        (group,) = self.param_groups
        beta2, eps = group["beta2"], group["eps"]
        for parameter, kept in zip(group["params"], self.kept, strict=True):
            state = self.state[parameter]
            if not state:
                state.update(step=0, exp_avg_sq=torch.zeros_like(parameter))
            state.pop("exp_avg", None)  # resumed from a CPU run, where SparseAdam stores it unused
            state["step"] += 1
            rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"])
            kept.move(parameter, state["exp_avg_sq"], rate, beta2, eps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for kept in self.kept:
            kept.forget()


class Optimizer:
    """AdamW (Loshchilov and Hutter, 2019). Norms and embedding tables are not decayed.

    An embedding row has a gradient only when it is looked up; decay would shrink rare rows to zero.
    n-gram tables, most of a small BLT's parameters, have sparse gradients: a step reads and updates only the rows
    looked up, and the moments of the others are unchanged (torch's SparseAdam). They have no momentum: the last
    gradients of a rarely read row are stale, and training is better without (docs/log.md).
    """

    def __init__(self, model: ByteModel, config: TrainConfig) -> None:
        self.clip = config.max_grad_norm
        own = {id(p): p for p in model.parameters() if p.requires_grad}
        device = next(iter(own.values())).device.type
        found = model.lookup_tables()
        tables = [own.pop(id(table.weight)) for table in found]
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
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=betas, fused=fused)
        ]
        self.kept: list[RowGradients] = []
        """Gradients of n-gram tables that are kept per bag."""
        if tables and device == "cpu":
            for table in found:
                table.sparse = True
            group = {"params": tables, "times": config.embedding_lr_scale}
            self.parts.append(RowAdam([group], lr=config.learning_rate, betas=(0.0, config.beta2)))
        self.parameters = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        """All parameters with a dense or sparse gradient."""
        if tables and device != "cpu":
            bags = BagAdam(found, config.learning_rate, config.beta2, config.embedding_lr_scale)
            self.parts.append(bags)
            self.kept = bags.kept

    def share(self, dist: DistContext) -> None:
        """All-reduce the gradients over the processes of a team."""
        dist.add_gradients(self.parameters)
        for kept in self.kept:
            kept.index, kept.gradients = ([dist.everyones(x) for x in some] for some in (kept.index, kept.gradients))

    def norm(self) -> Tensor:
        """The global gradient norm; gradients are clipped to `clip`. Does not synchronize."""
        dense: list[Tensor] = []
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = each_once(parameter.grad)
            if parameter.grad is not None:
                dense.append(parameter.grad._values() if parameter.grad.is_sparse else parameter.grad)
        norm = torch.nn.utils.get_total_norm([*dense, *(kept.norm() for kept in self.kept)])
        factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        gradients = [part for kept in self.kept for part in kept.gradients]
        torch._foreach_mul_([*dense, *gradients], factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def step(self, rate: float) -> None:
        """Apply one optimizer step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["times"]
            part.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def moments(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer state of a parameter; mutable."""
        (part,) = (p for p in self.parts if any(q is parameter for group in p.param_groups for q in group["params"]))
        return part.state[parameter]


def each_once(gradient: Tensor) -> Tensor:
    """A coalesced sparse gradient, unchanged if its rows are unique: autograd drops that flag."""
    rows = gradient._indices()[0]
    return gradient._coalesced_(True) if bool((rows[1:] > rows[:-1]).all()) else gradient.coalesce()


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """The learning rate at a step (from 0 on), when `fraction` of the run's budget is used up."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return config.learning_rate * warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
