"""The checkpoints of a training: what is written of it, and how it goes on from there.

One process writes all of it (`checkpoint.store`); several write their shares, by default while they train on
(`checkpoint.sharded`). Either is read by any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.parts import own_tensors
from bytelm.errors import CheckpointError
from bytelm.interfaces.model import ByteModel
from bytelm.nn.dtensor import is_dtensor
from bytelm.nn.sharded import rows_here, sharded_rows
from bytelm.training.dist import DistContext
from bytelm.training.journal import Journal
from bytelm.training.optimise import Optimizer

if TYPE_CHECKING:
    from bytelm.checkpoint.sharded import AsyncSaver

# `checkpoint.sharded` is imported where several processes train: with torch's part of it that takes half a second.

OTHERS = ("patcher.", "merges")  # what tensors are named that a training does not change


class Checkpointer:
    """Saves and restores a model and its optimizer; the rest of the state is the caller's, plain JSON."""

    def __init__(
        self, run: Path, model: ByteModel, optimizer: Optimizer, journal: Journal, dist: DistContext, later: bool
    ) -> None:
        """`later`: several processes write while they train on."""
        self.run, self.model, self.optimizer, self.journal, self.dist = run, model, optimizer, journal, dist
        self.saver: AsyncSaver | None = None
        if dist.world > 1 and later:
            from bytelm.checkpoint.sharded import AsyncSaver

            self.saver = AsyncSaver(dist.saves)

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any]) -> Path | None:
        """Write a checkpoint: all processes together; None if it is still being written.

        Waits for the one before. Raises ResourceError where the disk refuses that or this one.
        """
        tensors = {"model": self.model.state_dict(), store.OPTIMIZER: self.moments()}
        if self.dist.world == 1:
            return store.save(self.run, step, tensors, state)
        from bytelm.checkpoint import sharded

        with self.dist.answering():
            if self.saver is not None:
                self.saver.save(self.run, step, tensors, state)
                return None
            return sharded.save(self.run, step, tensors, state, self.dist.saves)

    def wait(self) -> Path | None:
        """Wait for a checkpoint that is still being written. Raises ResourceError where the disk refused it."""
        with self.dist.answering():
            return None if self.saver is None else self.saver.wait()

    def moments(self) -> dict[str, Tensor]:
        """The state of the optimizer by name of parameter and key, as DTensors of what is sharded."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for key, value in self.optimizer.moments(parameter).items():
                    found[f"{name}/{key}"] = sharded_rows(torch.as_tensor(value), parameter)
        return found

    # --- resuming -----------------------------------------------------------------------------------------------------

    def resume(self) -> tuple[Path, dict[str, Any]] | None:
        """Go on from the newest intact checkpoint, if there is one, and say which were not: its place and its state.

        Raises CheckpointError if none is intact, or if it is of another entropy model or tokenizer.
        """
        if not self.dist.broadcast(bool(store.checkpoints(self.run))):
            return None
        with self.dist.answering():
            alone = self.dist.world == 1
            if alone:
                path, corrupt = store.newest_good(self.run)
            else:
                from bytelm.checkpoint import sharded

                path, corrupt = sharded.newest_good(self.run, self.dist.saves)
        for reason in corrupt:
            self.journal.say(f"skipping corrupt checkpoint: {reason}")
        if not store.resumable(path):
            raise CheckpointError(
                f"{path} has weights alone, as what compare and sweep have finished: it cannot be resumed; "
                f"train another run with --init-from {self.run}"
            )
        if alone:
            self.check_others(path, weights := store.read_tensors(path, "model"))
            self.model.load_state_dict(weights)
            self.take(store.read_tensors(path, store.OPTIMIZER))
        else:
            weights = self.load(path)
            self.check_finite(path, weights)
            self.check_others(path, weights)
        return path, store.read_state(path)

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read this process's share of a checkpoint, and check it. Returns the tensors of the model."""
        from bytelm.checkpoint import sharded

        weights = {
            name: torch.empty_like(tensor) if name.startswith(OTHERS) else tensor
            for name, tensor in self.model.state_dict().items()
        }
        moments = self.room(
            {name: found.like for name, found in own_tensors(path, store.OPTIMIZER, hold=False).items()}
        )
        sharded.load(path, {"model": weights, store.OPTIMIZER: moments})
        self.take(moments)
        return weights

    def room(self, listed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Room for this process's share of moments, which are `listed` on the meta device."""
        found: dict[str, Tensor] = {}
        own = dict(self.model.named_parameters())
        for name, like in listed.items():
            parameter = own.get(name.rpartition("/")[0])
            if parameter is None:
                found[name] = torch.empty(like.shape, dtype=like.dtype)
                continue
            held = parameter.to_local() if is_dtensor(parameter) else parameter
            shape = (len(held), *like.shape[1:]) if like.ndim else ()
            found[name] = sharded_rows(torch.zeros(shape, dtype=like.dtype, device=held.device), parameter)
        return found

    def take(self, moments: Mapping[str, Tensor]) -> None:
        """Give the optimizer its moments."""
        for name, parameter in self.model.named_parameters():
            own = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
            if own:
                table = id(parameter) in self.optimizer.held
                kept = {key: place(value, parameter, key, table) for key, value in own.items()}
                self.optimizer.moments(parameter).update(kept)

    def check_finite(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError, in all processes, where the share of one has a NaN or an infinity."""
        bad = {name: store.not_finite(rows_here(w)[1]) for name, w in weights.items() if w.is_floating_point()}
        if self.dist.total(sum(bad.values()))[0]:
            found = [store.bad_values(name, count, weights[name].numel()) for name, count in bad.items() if count]
            store.refuse(path, found or ["not finite  in the share of another process"])

    def check_others(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Compare names and shapes, and what decides patches or tokens, with the model's. Raises CheckpointError."""
        own = self.model.state_dict()
        if self.dist.world == 1:
            store.check_keys(own, weights, str(path))
        if self.model.tokens is not None and not torch.equal(weights["merges"].cpu(), own["merges"].cpu()):
            raise CheckpointError(
                f"{path} was trained with another tokenizer than {self.run}/merges.npy: start another run"
            )
        for name, tensor in own.items():
            if name.startswith("patcher.") and not torch.equal(weights[name].cpu(), tensor.cpu()):
                raise CheckpointError(
                    f"{path} was trained with another entropy model than that in {self.run} "
                    f"({name} differs): restore it, or start another run"
                )


def place(value: Tensor, parameter: Tensor, key: str, table: bool) -> Tensor | int:
    """A moment on its parameter's device, of a table what is held here; a step count where fused kernels need it.

    Or unchanged as an integer.
    """
    if key == "step" and not value.is_floating_point():
        return int(value)
    if table:
        value = rows_here(value)[1]
    return value if key == "step" and parameter.device.type == "cpu" else value.to(parameter.device)
