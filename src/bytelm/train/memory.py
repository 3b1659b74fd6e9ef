"""How much memory a step takes, and what the C library does with large blocks that are freed."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass

import torch

from bytelm.interfaces.model import ByteModel, Stage
from bytelm.interfaces.objective import PIECE
from bytelm.nn import fused, runs
from bytelm.train.config import TrainConfig
from bytelm.transfer import HOST

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the numbers of these settings in glibc's malloc.h
LARGE = 1 << 20  # bytes
ANY = (1 << 31) - 1  # bytes: the settings are 32-bit integers
BUFFERS = 5  # of as many numbers as the slopes of tables are, in `optimise.BagAdam`


@dataclass(frozen=True)
class Memory:
    """Bytes that a step of training holds at the most, in three parts."""

    parameters: int
    """Weights, AdamW's two moments, and the weights once more in bfloat16."""
    activations: int
    """What a forward pass keeps for the way back, and what the largest of its layers needs meanwhile."""
    gradients: int

    @property
    def peak(self) -> int:
        """Gradients of weights come as activations go."""
        return self.parameters + max(self.activations, self.gradients)


def predict(model: ByteModel, config: TrainConfig, mean_patch: float, device: torch.device = HOST) -> Memory:
    """The memory of one step in bfloat16, float32 weights, on windows in patches of so many bytes on average.

    The model may be on the meta device. What is not in it: Python and torch themselves (about 0.3 GiB), libraries of
    products that keep buffers of their own, and the pages that a C library holds for later.
    """
    tables = {id(table.weight): table.weight for table in model.lookup_tables()}
    own = [p for p in model.parameters() if p.requires_grad]
    sparse = sum(p.numel() for p in own if id(p) in tables)
    dense = sum(p.numel() for p in own) - sparse
    frozen = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    stages = model.stages(config.window, round(config.window / mean_patch))
    widest = max((widest_layer(stage, config, device) for stage in stages), default=0)
    logits = 4 * model.vocabulary * (config.window * config.batch + min(config.window * config.batch, PIECE))
    activations = kept(model, config, mean_patch, device) + widest + logits
    if device.type == "cpu":
        return Memory(dense * (4 + 8 + 2) + sparse * (4 + 8) + frozen, activations, 4 * dense)
    # Slopes of what bytes read of tables stay until all micro-batches are done; then buffers of that size come and go.
    slopes = 4 * config.window * config.batch * sum(weight.shape[1] for weight in tables.values())
    memory = dense * (4 + 8 + 2) + sparse * (4 + 4) + frozen
    gradients = 4 * dense + config.accumulate * (1 + BUFFERS) * slopes
    return Memory(memory, activations + (config.accumulate - 1) * slopes, gradients)


def kept(model: ByteModel, config: TrainConfig, mean_patch: float, device: torch.device) -> int:
    """Bytes that a forward pass keeps for the way back: of layers, of what is beside them, and logits in float32."""
    found = 4 * model.vocabulary * config.window * config.batch
    for stage in model.stages(config.window, round(config.window / mean_patch)):
        positions, shape = stage.positions * config.batch, stage.stack.config
        beside, more = stage.beside, 0
        if plain(device):
            beside, more = beside + stage.plain, shape.plain(stage.apart or stage.positions)
        again = recomputes(config, stage.name)
        layers = 0 if again and stage.piece is not None else shape.kept(again) + more * (1 if again else shape.layers)
        found += positions * (layers + beside)
    return found


def widest_layer(stage: Stage, config: TrainConfig, device: torch.device) -> int:
    """Bytes of slopes of what a layer kept; where it was kept of a piece alone, that of all its layers too."""
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
    """Whether torch's own kernels compute there: not on a CPU, nor on a GPU with Triton and attention by runs."""
    return device.type != "cpu" and not (runs.present(device.type) and fused.triton_kernels())


def recomputes(config: TrainConfig, stage: str) -> bool:
    """Whether the layers of a stage are computed again for their gradients."""
    return config.recompute is True or config.recompute == stage


def give_back_large_blocks() -> None:
    """Have blocks of 1 MiB and more mapped one by one, where the C library is glibc; elsewhere do nothing.

    By itself glibc learns to keep blocks of up to 32 MiB in its heap. When patches are computed piece by piece, the
    little that is kept of each pins what is freed around it: 28 kB a byte for two layers of width 768, where what is
    kept comes to 1 kB (docs/log.md). Mapping costs page faults, so it is for runs that spare memory.
    """
    _set(_MMAP_THRESHOLD, LARGE)


def keep_large_blocks() -> None:
    """Have freed blocks of up to 2 GiB kept for the next step, where the C library is glibc; elsewhere do nothing.

    By itself glibc maps those above 32 MiB anew each time, and every page of them costs a fault: a tenth of a step with
    a gradient of 38 MB for n-gram tables (docs/log.md).
    """
    _set(_MMAP_THRESHOLD, ANY)
    _set(_TRIM_THRESHOLD, ANY)


def _set(setting: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(setting, value)
