"""Memory prediction of a step, and malloc settings for large blocks."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass

import torch

from bytelm.interfaces.model import ByteModel, Stage
from bytelm.interfaces.objective import PIECE
from bytelm.nn import fused, runs
from bytelm.training.config import TrainConfig
from bytelm.transfer import HOST

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the numbers of these settings in glibc's malloc.h
LARGE = 1 << 20  # bytes
ANY = (1 << 31) - 1  # bytes: the settings are 32-bit integers
BUFFERS = 4  # of the size of the tables' gradients, in `optimise.BagAdam`


@dataclass(frozen=True)
class Memory:
    """Peak memory of a training step in bytes, in three parts."""

    parameters: int
    """Weights, AdamW's two moments, and the weights once more in bfloat16; of n-gram tables one moment at the most."""
    activations: int
    """Activations saved for the backward pass, and the working memory of the largest layer."""
    gradients: int
    host: int = 0
    """In main memory: n-gram tables and their moments, of a model on a device with `train.tables = "host"`."""

    @property
    def peak(self) -> int:
        """Gradients of weights are allocated as activations are freed."""
        return self.parameters + max(self.activations, self.gradients)


def predict(model: ByteModel, config: TrainConfig, mean_patch: float, device: torch.device = HOST) -> Memory:
    """The memory of one step in bfloat16, float32 weights, on windows in patches of so many bytes on average.

    The model may be on the meta device. Not included: Python and torch themselves (about 0.3 GiB), buffers of
    BLAS libraries, and pages that the C library caches.
    """
    tables = {id(table.weight): table.weight for table in model.lookup_tables()}
    own = [p for p in model.parameters() if p.requires_grad]
    dense = sum(p.numel() for p in own if id(p) not in tables)
    sparse = sum(4 * p.numel() + table_moments(p, config) for p in own if id(p) in tables)
    frozen = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    stages = model.stages(config.context_length, round(config.context_length / mean_patch))
    widest = max((widest_layer(stage, config, device) for stage in stages), default=0)
    logits = (
        4 * model.vocabulary * (config.context_length * config.batch + min(config.context_length * config.batch, PIECE))
    )
    activations = kept(model, config, mean_patch, device) + widest + logits
    if device.type == "cpu":
        return Memory(dense * (4 + 8 + 2) + sparse + frozen, activations, 4 * dense)
    if config.tables == "host":
        return Memory(dense * (4 + 8 + 2) + frozen, activations, 4 * dense, sparse)
    # Per-byte gradients of tables are kept until all micro-batches are done; then buffers of that size are temporary.
    gradients = 4 * config.context_length * config.batch * sum(weight.shape[1] for weight in tables.values())
    memory = dense * (4 + 8 + 2) + sparse + frozen
    gradients = 4 * dense + config.gradient_accumulation_steps * (1 + BUFFERS) * gradients
    return Memory(memory, activations + (config.gradient_accumulation_steps - 1) * gradients, gradients)


def table_moments(weight: torch.Tensor, config: TrainConfig) -> int:
    """Bytes of the optimizer state of a table `[rows, dim]`, see `optimise.TableAdam`."""
    return 4 * (len(weight) if config.table_optimizer == "rowwise_adam" else weight.numel())


def kept(model: ByteModel, config: TrainConfig, mean_patch: float, device: torch.device) -> int:
    """Bytes of saved activations: of layers, of the rest, and logits in float32."""
    found = 4 * model.vocabulary * config.context_length * config.batch
    for stage in model.stages(config.context_length, round(config.context_length / mean_patch)):
        positions, shape = stage.positions * config.batch, stage.stack.config
        beside, more = stage.beside, 0
        if plain(device):
            beside, more = beside + stage.plain, shape.plain(stage.apart or stage.positions)
        again = recomputes(config, stage.name)
        layers = 0 if again and stage.piece is not None else shape.kept(again) + more * (1 if again else shape.layers)
        found += positions * (layers + beside)
    return found


def widest_layer(stage: Stage, config: TrainConfig, device: torch.device) -> int:
    """Bytes of gradients of saved activations; if saved by chunk, the activations of all its layers too."""
    positions, shape = stage.positions * config.batch, stage.stack.config
    more = shape.plain(stage.apart or stage.positions) if plain(device) else 0
    layer = 8 * (shape.dim + shape.hidden()) + more
    if not recomputes(config, stage.name):
        return positions * layer
    if stage.piece is None:
        return positions * 2 * layer
    held = shape.kept(recompute=False) + shape.layers * more + stage.beside
    return min(positions, stage.piece) * (held + layer)


def plain(device: torch.device) -> bool:
    """Whether plain torch kernels are used: not on a CPU, nor on a GPU with Triton and variable-length attention."""
    return device.type != "cpu" and not (runs.present(device.type) and fused.triton_kernels())


def recomputes(config: TrainConfig, stage: str) -> bool:
    """Whether a stage uses activation checkpointing."""
    return config.activation_checkpointing is True or config.activation_checkpointing == stage


def give_back_large_blocks() -> None:
    """Have glibc mmap blocks of 1 MiB and more separately; elsewhere do nothing.

    By default glibc adapts to keep blocks of up to 32 MiB in its heap. When patches are computed in chunks, the
    little saved of each fragments the heap: 28 kB per byte for two layers of width 768, of which 1 kB is saved
    (docs/log.md). Mapping costs page faults, so it is for runs that save memory.
    """
    _set(_MMAP_THRESHOLD, LARGE)


def keep_large_blocks() -> None:
    """Have glibc keep freed blocks of up to 2 GiB for the next step; elsewhere do nothing.

    By default glibc maps blocks above 32 MiB each time, at the cost of a fault per page: a tenth of a step with
    a gradient of 38 MB for n-gram tables (docs/log.md).
    """
    _set(_MMAP_THRESHOLD, ANY)
    _set(_TRIM_THRESHOLD, ANY)


def _set(setting: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(setting, value)
