"""A model that several processes share: FSDP2 over what is dense, n-gram tables by rows, the patcher on each.

    root            gathered once a pass: embeddings, norms, heads, and stages that are computed in pieces
    └ units         gathered before their pass and freed after it; their gradients are reduced as soon as they are there
    tables          nobody gathers them: rows are exchanged (`nn.sharded`)
    patcher         frozen and whole on each process: boundaries need nobody else

Gradients are sums over processes, not means: the loss is divided by the count over all of them already.

Weights are gathered in float32 on a CPU, whose kernels round them, and on a GPU in the precision of products.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from bytelm.interfaces.model import ByteModel
from bytelm.training.config import ParallelConfig
from bytelm.training.dist import DistContext, launched

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def parallelize(
    model: ByteModel,
    dist: DistContext,
    config: ParallelConfig,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> None:
    """Shard a model on the meta device over the processes, and give this one's share memory; without values yet.

    Its patcher is not on the meta device but on its own.
    Whatever moves its weights, as an optimizer, is to be made afterwards: FSDP2 replaces them. Raises ConfigError for a
    layout that the number of processes does not fit.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    replicate, shard = config.layout(dist.world, launched()[1])
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    if replicate == 1:
        mesh = mesh["shard"]
    if config.tables == "sharded":
        for table in model.lookup_tables():
            table.shard(init_device_mesh("cpu" if table.on_host else device.type, (dist.world,)))
    ignored = {table.weight for table in model.lookup_tables()}
    if model.patcher is not None:
        ignored |= set(model.patcher.parameters())
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if device.type != "cpu" and precision != torch.float32:
        policy = MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
    # Of outputs that are views: nobody here changes logits in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    ignored = cast("set[nn.Parameter]", ignored)
    for unit in (*model.units(), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    for unit in sharded_modules(model):
        # Both reach one unit only. Gloo has no sum that is scaled on the way, which a factor alone would ask for.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    patcher, model.patcher = model.patcher, None
    model.to_empty(device=device)
    model.patcher = patcher


def is_unit(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether FSDP2 gathers a module; there is none before it was imported, which takes half a second."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered and freed as one, the model itself first; none where one process has it all."""
    return [module for module in model.modules() if is_unit(module)]


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over the processes, or keeps all of them here."""
    if is_unit(model):
        model.set_requires_gradient_sync(wanted)


def gather(model: nn.Module) -> None:
    """Gather what is not in a unit, for what is computed outside of a pass, until `free`."""
    if is_unit(model):
        model.unshard()


def free(model: nn.Module) -> None:
    """Free what a pass without gradients has left gathered."""
    for unit in sharded_modules(model):
        unit.reshard()
