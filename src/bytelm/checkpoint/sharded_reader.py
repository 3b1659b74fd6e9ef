"""Reading a checkpoint into tensors that several processes hold in parts: DCP plans what each needs, we read that."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from bytelm.checkpoint import store
from bytelm.checkpoint.parts import Part, StoredTensor, own_tensors
from bytelm.checkpoint.tensors import DTYPES

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by group ("model", "optimizer") and name."""


def flat(tensors: Groups) -> dict[str, Tensor]:
    """Tensors by "group/name". Raises ValueError for one that no checkpoint can hold."""
    found = {f"{group}/{name}": tensor for group, members in tensors.items() for name, tensor in members.items()}
    for name, tensor in found.items():
        if tensor.is_meta or tensor.dtype not in DTYPES:
            raise ValueError(f"{name} cannot be in a checkpoint: {tensor.dtype} on {tensor.device}")
    return found


def load(path: Path, tensors: Groups) -> None:
    """Fill tensors in place from a checkpoint of any format and any number of processes.

    Each is a DTensor, or a plain one that gets the whole. Each process reads and checks the parts of which it needs
    something, and no collective is called. `tensors` has all names of each of its groups, as in `sharded.save`. Raises
    CheckpointError for another name, shape or dtype, with a table, and for a file that is missing or damaged; the
    tensors may then be filled in part.
    """
    everything = flat(tensors)
    found: dict[str, StoredTensor] = {}
    for group, members in tensors.items():
        own = own_tensors(path, group, hold=False)
        likes = {name: torch.empty(like.shape, dtype=like.dtype, device="meta") for name, like in members.items()}
        store.check_keys(likes, {name: tensor.like for name, tensor in own.items()}, path)
        found |= {f"{group}/{name}": tensor for name, tensor in own.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist asks for
        try:
            dcp_load(cast("dict[str, Any]", everything), storage_reader=_Reader(found), planner=planner, no_dist=True)
        except CheckpointException as failed:  # a BaseException, with what was raised
            raise next(error for error, _ in failed.failures.values()) from None


class _Reader(StorageReader):
    """Parts as `checkpoint.parts` finds them, each read once, some rows at a time, and checked."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _described(tensor) for name, tensor in self.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reads = [(self._part(item), item) for item in plan.items]
        for part, item in sorted(reads, key=lambda read: (read[0].path, read[0].start)):
            _fill(planner.resolve_tensor(item), part, item, self.tensors[item.storage_index.fqn])
        done = Future[None]()
        done.set_result(None)
        return done

    def _part(self, item: ReadItem) -> Part:
        """The part that DCP wants something of."""
        offsets = tuple(item.storage_index.offset or ())
        (found,) = (part for part in self.tensors[item.storage_index.fqn].parts if part.offsets == offsets)
        return found

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _described(tensor: StoredTensor) -> TensorStorageMetadata:
    """A tensor and its parts, as DCP plans with them."""
    chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape)) for part in tensor.parts]
    return TensorStorageMetadata(TensorProperties(tensor.like.dtype), tensor.like.shape, chunks)


def _fill(target: Tensor, part: Part, item: ReadItem, tensor: StoredTensor) -> None:
    """Put the box of a part that an item names into its target, of the same shape."""
    box = [slice(at, at + count) for at, count in zip(item.storage_offsets, item.lengths, strict=True)]
    for first, rows in part.pieces(tensor.name, tensor.like.dtype):
        if not box:
            target.copy_(rows)
            continue
        begin, end = max(first, box[0].start), min(first + len(rows), box[0].stop)
        if begin < end:
            wanted = rows[(slice(begin - first, end - first), *box[1:])]
            target[begin - box[0].start : end - box[0].start].copy_(wanted)
