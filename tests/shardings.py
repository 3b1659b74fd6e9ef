"""Tensors that several processes hold in parts, saved and loaded by any number of them; what processes of a test do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bytelm.checkpoint import sharded

TABLE = 11  # rows


def whole(step: int) -> dict[str, dict[str, Tensor]]:
    """All that step `step` of the test runs holds."""
    generator = torch.Generator().manual_seed(step)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    model = {"rows": values(10, 3), "few": values(2, 5).bfloat16(), "columns": values(3, 7), "none": values(0, 4)}
    model |= {"alike": values(4), "table": values(TABLE, 2), "bits": values(9) > 0}
    optimizer = {"rows/exp_avg": values(10, 3), "table/exp_avg_sq": values(TABLE), "rows/step": torch.tensor(step)}
    return {"model": model, "optimizer": {**optimizer, "alike/step": torch.tensor(step / 7)}}


PLACED = {"rows": 0, "few": 0, "columns": 1, "none": 0, "bits": 0, "rows/exp_avg": 0}  # the axis that is cut


def placed(tensors: Mapping[str, Mapping[str, Tensor]], mesh: DeviceMesh) -> dict[str, dict[str, Tensor]]:
    """The same as the processes of a mesh hold it; of a 2-D mesh the first axis has replicas."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("table"):
            at, size = mesh.get_rank(), -(-TABLE // dist.get_world_size())
            if mesh.ndim == 1:
                at, size = mesh.get_local_rank(), -(-TABLE // mesh.size())
            return sharded.as_whole_rows(tensor[at * size : (at + 1) * size].clone(), TABLE, mesh)
        if name in PLACED:
            axes = [Replicate()] * (mesh.ndim - 1) + [Shard(PLACED[name])]
            found = distribute_tensor(tensor, mesh, axes, src_data_rank=None)
            return torch.nn.Parameter(found) if name == "rows" else found
        return tensor.clone()

    return {group: {name: one(name, t) for name, t in members.items()} for group, members in tensors.items()}


def same(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether this process holds the same values of both."""

    def local(tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    return all(torch.equal(local(t), local(other[group][name])) for group in one for name, t in one[group].items())


def join() -> None:
    """Be one of the processes of a world."""
    dist.init_process_group("gloo")


def meshes(sizes: list[int]) -> dict[str, DeviceMesh]:
    """Meshes of the first processes, and the one of replicas and shards of four; every process calls it."""
    found = {str(size): DeviceMesh("cpu", torch.arange(size)) for size in sizes}
    if dist.get_world_size() == 4:
        found["2 x 2"] = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    return found


def by_any_number(folder: Path, sizes: list[int]) -> int:
    """Save by each number of processes, load by each, and what one process saved too; how many loads were right."""
    join()
    found, right = meshes(sizes), 0
    groups = {name: dist.new_group(list(range(mesh.size()))) for name, mesh in found.items()}
    for name, mesh in found.items():
        run = folder / f"by {name}"
        if dist.get_rank() == 0:
            run.mkdir()
        dist.barrier()
        if dist.get_rank() < mesh.size():
            state: dict[str, Any] = {"world": mesh.size()}
            path = sharded.save(run, 7, placed(whole(7), mesh), state, groups[name])
            assert path == run / "checkpoints" / "step-00000007"
    dist.barrier()
    for path in sorted(folder.glob("*/checkpoints/step-00000007")):
        for mesh in found.values():
            if dist.get_rank() < mesh.size():
                target = placed(whole(0), mesh)
                sharded.load(path, target)
                assert same(target, placed(whole(7), mesh)), (path, mesh)
                right += 1
    return right
