"""Tensors that several processes hold in parts, saved and loaded by any number of them; what processes of a test do."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bytelm.checkpoint import manifest, sharded, store
from bytelm.checkpoint.parts import own_tensors
from bytelm.errors import CheckpointError, ResourceError

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


def by_rows(local: Tensor, mesh: DeviceMesh) -> DTensor:
    """A table whose rows are over all processes of a mesh, in the memory of `local`."""
    row = DeviceMesh(mesh.device_type, mesh.mesh.flatten(), _init_backend=False)
    like = torch.empty(TABLE, *local.shape[1:], device="meta")
    return DTensor.from_local(local, row, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())


def placed(tensors: Mapping[str, Mapping[str, Tensor]], mesh: DeviceMesh) -> dict[str, dict[str, Tensor]]:
    """The same as the processes of a mesh hold it; of a 2-D mesh the first axis has replicas."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("table"):
            at, size = mesh.get_rank(), -(-TABLE // dist.get_world_size())
            if mesh.ndim == 1:
                at, size = mesh.get_local_rank(), -(-TABLE // mesh.size())
            return by_rows(tensor[at * size : (at + 1) * size].clone(), mesh)
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


def steps(run: Path, ahead: list[int], keep: int = 2) -> list[str]:
    """Save steps one after the other, by all processes of a world; the names of what was saved."""
    join()
    mesh, group = DeviceMesh("cpu", torch.arange(dist.get_world_size())), dist.new_group()
    return [sharded.save(run, step, placed(whole(step), mesh), {}, group, keep).name for step in ahead]


def refused(run: Path, faults: list[tuple[int, str, int]]) -> list[str]:
    """For each fault (process, call, how many of it succeed first) the error of a save of step 2 that meets it."""
    join()
    mesh, group = DeviceMesh("cpu", torch.arange(dist.get_world_size())), dist.new_group()
    sharded.save(run, 1, placed(whole(1), mesh), {}, group)
    found: list[str] = []
    for process, call, left in faults:
        with failing(call, left) if process == dist.get_rank() else contextlib.nullcontext():
            try:
                sharded.save(run, 2, placed(whole(2), mesh), {}, group)
            except ResourceError as error:
                found.append(str(error))
            else:
                found.append("saved")
        dist.barrier()
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]
        store.verify(run / "checkpoints" / "step-00000001")
        dist.barrier()
    return found


def good(run: Path) -> tuple[str, list[str]] | str:
    """What all processes of a world find to go on from, and pass over."""
    join()
    try:
        path, passed_over = sharded.newest_good(run, dist.new_group())
    except CheckpointError as error:
        return str(error)
    return path.name, passed_over


@contextlib.contextmanager
def failing(call: str, left: int) -> Generator[None]:
    """`os.fsync` or `os.rename`, of which all but the first `left` calls meet a full disk."""
    real, counted = getattr(os, call), itertools.count()

    def fails(*given: Any) -> Any:
        if next(counted) >= left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    setattr(os, call, fails)
    try:
        yield
    finally:
        setattr(os, call, real)


def in_the_background(run: Path, times: int) -> tuple[float, bool]:
    """Save again and again while sums go on in another group: their total, and whether each saved what was asked for.

    What is held changes as soon as a save has returned.
    """
    join()
    mesh, saves = DeviceMesh("cpu", torch.arange(dist.get_world_size())), dist.new_group()
    saver, held, total = sharded.AsyncSaver(saves), placed(whole(0), mesh), torch.zeros(())
    good = True
    for step in range(1, times + 1):
        for group, members in placed(whole(step), mesh).items():
            for name, tensor in members.items():
                held[group][name].detach().copy_(tensor)
        saver.save(run, step, held, {"said": step})
        for members in held.values():
            for tensor in members.values():
                tensor.detach().zero_()
        for _ in range(3):
            one = torch.ones(1000)
            dist.all_reduce(one)
            total += one[-1]
        if step % 20 == 0:
            path = saver.wait()
            assert path is not None and saver.wait() is None
            sharded.load(path, held)
            good &= same(held, placed(whole(step), mesh)) and store.read_state(path) == {"said": step, "step": step}
    return float(total), good


def wrong_in_the_background(run: Path) -> list[str]:
    """What each process is told of a save that fails in one of them: its disk, its memory, its state."""
    join()
    mesh, saves = DeviceMesh("cpu", torch.arange(dist.get_world_size())), dist.new_group()
    saver, tensors, found = sharded.AsyncSaver(saves), placed(whole(1), mesh), list[str]()
    last = dist.get_rank() == dist.get_world_size() - 1

    def told(work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("nothing")

    with failing("fsync", 1) if last else contextlib.nullcontext():
        saver.save(run, 1, tensors, {})
        told(saver.wait)
    saver.save(run, 2, tensors, {"nan": float("nan")} if last else {})
    told(lambda: saver.save(run, 3, tensors, {}))  # which is not begun
    with mock.patch.object(torch.Tensor, "copy_", side_effect=MemoryError) if last else contextlib.nullcontext():
        saver.save(run, 4, tensors, {})
    told(saver.wait)
    saver.save(run, 5, tensors, {})
    told(saver.wait)
    return found


def resaved(source: Path, run: Path) -> Path:
    """Load a checkpoint, every tensor cut along its first axis, and save it again."""
    join()
    mesh, group = DeviceMesh("cpu", torch.arange(dist.get_world_size())), dist.new_group()
    held: dict[str, dict[str, Tensor]] = {}
    for part in {name.split("-")[0].split(".")[0] for name in manifest.files(source)} & {"model", "optimizer"}:
        likes = {name: tensor.like for name, tensor in own_tensors(source, part).items()}
        zeros = {name: torch.zeros(like.shape, dtype=like.dtype) for name, like in likes.items()}
        held[part] = {
            name: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) if t.ndim else t
            for name, t in zeros.items()
        }
    sharded.load(source, held)
    state = store.read_state(source)
    return sharded.save(run, state["step"], held, state, group)
