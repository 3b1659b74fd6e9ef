"""Between host and device: whole numbers that decide a size or a branch stay on the host.

    host    ids, boundaries → plan: lengths, documents, patches      decided here, where asking costs nothing
                               │ one way, from pinned memory, without a wait
    device  weights, states    ▼ gathered, multiplied, added         nothing here decides a size or a branch

On a CPU both are one place: nothing is copied, and nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOST = torch.device("cpu")


def to_device(x: Tensor, where: Tensor | torch.device) -> Tensor:
    """The same numbers where `where` is. From the host to a GPU they travel in order with its work, without a wait."""
    device = where if isinstance(where, torch.device) else where.device
    if x.device.type == device.type:  # a process has one device
        return x
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # from pageable memory a copy waits for all that is queued
    return x.to(device, non_blocking=device.type == "cuda")


def to_host(x: Tensor) -> Tensor:
    """The same numbers on the host: from a device one wait for all that is queued there, on a CPU nothing."""
    return x if x.device.type == "cpu" else x.to(HOST)
