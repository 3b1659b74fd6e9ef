"""Checkpoints that several processes write and read, each its own part, through PyTorch Distributed Checkpoint (DCP).

    run/checkpoints/step-00001000/
        model-00000.safetensors      model-00000.json         what process 0 wrote of a group, and its index
        optimizer-00000.safetensors  optimizer-00000.json     (`checkpoint.parts`)
        model-00001.safetensors      ...
        state.json                   all that is not a tensor
        MANIFEST.json                size and sha256 of every other file; format 3

DCP plans who writes what, and carries errors to every process. The files are ours: nothing is pickled, each part has a
checksum, and `store.finish` publishes all of it with one rename, after every process has its files on the disk. What
several processes hold alike is written once. `store` and `bytelm.load` read such a checkpoint too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future as Working
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from bytelm.checkpoint import manifest, store
from bytelm.checkpoint.manifest import SHARDED
from bytelm.checkpoint.sharded_reader import Groups, flat, load
from bytelm.checkpoint.store import KEEP, NEW, STATE
from bytelm.checkpoint.tensors import DTYPES, header, order, pieces
from bytelm.checkpoint.writing import Entry, write
from bytelm.device import out_of_memory
from bytelm.errors import CheckpointError, ResourceError

__all__ = ["AsyncSaver", "Groups", "load", "newest_good", "save"]


@dataclass(frozen=True)
class _Held:
    """What this process holds of a tensor."""

    local: Tensor
    offsets: torch.Size
    whole: torch.Size

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Held:
        if not isinstance(tensor, DTensor):
            return cls(tensor.detach(), torch.Size([0] * tensor.ndim), tensor.shape)
        (chunk,) = cast("list[ChunkStorageMetadata]", tensor.__create_chunk_list__())
        return cls(tensor.to_local().detach(), chunk.offsets, tensor.shape)

    def item(self, name: str) -> WriteItem:
        """What DCP is told of it."""
        return WriteItem(
            MetadataIndex(name, self.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(self.offsets, self.local.shape), TensorProperties(self.local.dtype), self.whole
            ),
        )


def newest_good(run: Path, group: ProcessGroup) -> tuple[Path, list[str]]:
    """As `store.newest_good`, closely, for all processes of `group` (of CPUs): each checks its share of the files.

    Collective, and the same in all of them, also what it raises.
    """
    found = [store.checkpoints(run)]
    dist.broadcast_object_list(found, group=group, group_src=0)

    def verify(path: Path) -> None:
        said: list[str | None] = [None] * dist.get_world_size(group)
        mine = None
        try:
            manifest.verify(path, share=(dist.get_rank(group), len(said)))
        except CheckpointError as error:
            mine = str(error)
        dist.all_gather_object(said, mine, group)
        if bad := next(filter(None, said), None):
            raise CheckpointError(bad)

    return store.first_good(run, found[0], verify)


# ---- saving ----


def save(
    run: Path, step: int, tensors: Groups, state: Mapping[str, Any], group: ProcessGroup, keep: int = KEEP
) -> Path:
    """Write `run/checkpoints/step-<step>` together with the other processes of `group` (of CPUs), and return its path.

    Each tensor is a DTensor, or a plain one that all processes hold alike; groups and names are the same everywhere.
    `state` and `keep`: see `store.save`; the state of the group's first process is written. Collective. What goes wrong
    in one process is raised in all: ResourceError where a disk refuses, ValueError for what is no state. The
    checkpoints there were are then as before. RuntimeError where a process is lost.
    """
    return _together(_Save.of(run, step, tensors, state, keep, _Held.of), group)


class AsyncSaver:
    """Saves in the background: one at a time, of what was held when it was asked for."""

    def __init__(self, group: ProcessGroup) -> None:
        """`group`: of CPUs, and used by nothing else; collectives of a training would mix with those of a save."""
        self._group = group
        self._room: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._under_way: Working[Path] | None = None

    def save(self, run: Path, step: int, tensors: Groups, state: Mapping[str, Any], keep: int = KEEP) -> None:
        """Copy what this process holds to host memory, and return; see `save` for the rest, which `wait` raises.

        Waits for the save before, and raises what went wrong there; then nothing of this one was begun.
        """
        self.wait()
        task = _Save.of(run, step, tensors, state, keep, self._copied)
        self._under_way = self._pool.submit(_together, task, self._group)

    def wait(self) -> Path | None:
        """Wait for the save under way: the checkpoint; None where none is. Raises what went wrong, as `save` does.

        To be called before the group is destroyed. No collective.
        """
        working, self._under_way = self._under_way, None
        return working.result() if working else None

    def done(self) -> bool:
        """Whether `wait` would not wait."""
        return self._under_way is None or self._under_way.done()

    def _copied(self, name: str, tensor: Tensor) -> _Held:
        held = _Held.of(name, tensor)
        room = self._room.get(name)
        if room is None or room.shape != held.local.shape or room.dtype != held.local.dtype:
            pinned = held.local.is_cuda
            room = torch.empty(held.local.shape, dtype=held.local.dtype, device="cpu", pin_memory=pinned)
            self._room[name] = room
        room.copy_(held.local, non_blocking=True)
        return dataclasses.replace(held, local=room)


@dataclass(frozen=True)
class _Save:
    """One save, as this process has it."""

    run: Path
    step: int
    keep: int
    groups: tuple[str, ...]
    text: bytes = b""
    """Of state.json."""
    held: Mapping[str, _Held] = field(default_factory=dict[str, _Held])
    needed: int = 0
    """Bytes of all tensors, of all processes."""
    failure: Exception | None = None
    """Why this process has nothing to save. The others are told when all meet: alone they would wait."""

    @property
    def final(self) -> Path:
        """The checkpoint."""
        return store.place(self.run, self.step)

    @classmethod
    def of(
        cls,
        run: Path,
        step: int,
        tensors: Groups,
        state: Mapping[str, Any],
        keep: int,
        hold: Callable[[str, Tensor], _Held],
    ) -> _Save:
        store.check_keep(keep)
        started = cls(run, step, keep, tuple(tensors))
        try:
            everything = flat(tensors)
            needed = sum(tensor.numel() * tensor.element_size() for tensor in everything.values())
            started = dataclasses.replace(started, text=store.state_text(step, state), needed=needed)
            held = {name: hold(name, tensor) for name, tensor in everything.items()}
            if any(tensor.is_cuda for tensor in everything.values()):
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            return dataclasses.replace(started, failure=error)
        return dataclasses.replace(started, held=held)


def _together(task: _Save, group: ProcessGroup) -> Path:
    """Save with the others. Raises the same error in each."""
    writer = _Writer(task)
    try:
        dcp_save({}, storage_writer=writer, planner=_Planner(task), process_group=group)
    except CheckpointException as found:  # a BaseException, with what was raised in each process that failed
        process, (error, _) = min(found.failures.items(), key=lambda failed: failed[0])
        raise _told(task, process, error) from None
    finally:
        store.discard(writer.aside)
    return task.final


def _told(task: _Save, process: int, error: BaseException) -> BaseException:
    """What a failure of one process is everywhere."""
    who = f"process {process}: "
    if isinstance(error, OSError):
        return ResourceError(store.refusal(task.final, error, task.needed, who))
    if isinstance(error, Exception) and out_of_memory(error):
        return ResourceError(
            f"cannot save {task.final}: {who}no memory for a copy of what it holds: save in the foreground"
        )
    return error


class _Planner(DefaultSavePlanner):
    """Every part that a process holds; the default drops what another one writes too."""

    def __init__(self, task: _Save) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.task = task

    def create_local_plan(self) -> SavePlan:
        if self.task.failure is not None:
            raise self.task.failure
        # Of a tensor that has values, parts without any need no place.
        held = {name: held for name, held in self.task.held.items() if held.local.numel() or not held.whole.numel()}
        self.plan = SavePlan([part.item(name) for name, part in held.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.task.held[index.fqn].local


class _Writer(StorageWriter):
    """A file and an index of each group for each process; the first process publishes the folder once all have."""

    def __init__(self, task: _Save) -> None:
        self.task = task
        self.aside: Path | None = None
        """The first process's, to be removed."""
        self.number = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.number = int(kwargs["rank"])  # DCP tells it only where the argument has this very name

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.aside = store.begin(self.task.run, self.task.final)
        return [dataclasses.replace(plan, storage_data=str(self.aside)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder = Path(plan.storage_data) / NEW
        files: dict[str, Entry] = {}
        for group in self.task.groups:
            items = {item.index.fqn.removeprefix(f"{group}/"): item for item in plan.items if _in(group, item)}
            path = folder / f"{group}-{self.number:05d}.safetensors"
            files |= _write_part(path, items, {name: planner.resolve_data(item) for name, item in items.items()})
        done = Future[list[WriteResult]]()
        done.set_result([WriteResult(MetadataIndex(name), entry.size, entry.table()) for name, entry in files.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.aside is not None
        files = {STATE: write(self.aside / NEW / STATE, [("", self.task.text)])}
        files |= {found.index.fqn: Entry.of(found.storage_data) for part in results for found in part}
        text = manifest.text(self.task.step, files, SHARDED)
        store.finish(self.aside, self.task.final, text, self.task.keep)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _in(group: str, item: WriteItem) -> bool:
    return item.index.fqn.startswith(f"{group}/")


def _write_part(path: Path, items: Mapping[str, WriteItem], held: Mapping[str, Any]) -> dict[str, Entry]:
    """Write the file of one process and group, and its index."""
    head = header(held)
    entry = write(path, pieces(head, held))
    listed: dict[str, Any] = {}
    start = len(head)
    for name in order(held):
        said = items[name].tensor_data
        assert said is not None
        shape, dtype = {"whole": said.size, "offsets": said.chunk.offsets, "shape": said.chunk.sizes}, held[name].dtype
        listed[name] = {"dtype": DTYPES[dtype], **{key: list(value) for key, value in shape.items()}}
        listed[name] |= {"start": start, "sha256": entry.tensors[name]}
        start += held[name].nbytes
    index = path.with_suffix(".json")
    text = json.dumps({"tensors": listed}, separators=(",", ":")).encode()
    return {path.name: Entry(entry.size, entry.sha256), index.name: write(index, [("", text)])}
