"""Device selection: resolves a device name to an available device of this process.

    cpu, cuda:1     as they say
    cuda            the current GPU; where torchrun started several processes, that of this one (LOCAL_RANK)
    mps             Apple's
    auto            what BYTELM_DEVICE says; without it cuda where there is one, else cpu

mps is taken only where it is named: it has no float64, no sparse gradients, and nothing of ours was measured on it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch

from bytelm import machine
from bytelm.errors import ResourceError, UsageError
from bytelm.machine import Memory
from bytelm.units import show_bytes

AUTO = "auto"
VARIABLE = "BYTELM_DEVICE"
LOCAL_RANK = "LOCAL_RANK"  # torchrun's number of a process among those of one machine
IEEE = ("none", "ieee")  # float32 as it is; TF32 keeps 10 of its 23 bits, bfloat16 7


def there() -> list[str]:
    """The devices that this process can compute on, the CPU first."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{card}" for card in range(cards)), *(["mps"] if torch.backends.mps.is_available() else [])]


def resolve(name: str | torch.device = AUTO) -> torch.device:
    """The device of a name. Raises UsageError for one that is not there, and names those that are."""
    found = str(name)
    if found == AUTO:
        found = os.environ.get(VARIABLE) or AUTO
    if found == AUTO:
        found = "cuda" if torch.cuda.is_available() else "cpu"
    rank = os.environ.get(LOCAL_RANK)
    if found == "cuda" and torch.cuda.is_available():
        found = f"cuda:{torch.cuda.current_device() if rank is None else rank}"
        if found not in there():
            raise UsageError(
                f"process {rank} of this machine has no GPU: there are {torch.cuda.device_count()}: "
                "start as many processes as GPUs, or take --device cpu"
            )
    if found not in there():
        raise UsageError(f"no device {found} here: take one of {', '.join(there())}, or {AUTO}")
    return torch.device(found)


def use(name: str | torch.device = AUTO) -> torch.device:
    """The device of a name, made the one that this process launches kernels on. Raises UsageError as `resolve` does."""
    device = resolve(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def called(device: torch.device) -> str:
    """What people call a device: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor()


def memory(device: torch.device) -> Memory:
    """Bytes of a GPU's own memory; of main memory for all others."""
    if device.type != "cuda":
        return machine.memory()
    free, total = torch.cuda.mem_get_info(device)
    return Memory(total, free)


def peak_memory(device: torch.device) -> int:
    """Bytes of memory taken at the most since this process began: what torch keeps of a GPU, all there is on a CPU.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: on a CPU torch says so in words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def fitting(device: torch.device, what: str, way_out: Callable[[], str]) -> Generator[None]:
    """Have a device that runs out of memory raise a ResourceError: what did not fit, and the knob to turn."""
    try:
        yield
    except GeneratorExit:  # looked for by no name that may be gone at exit
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        held = f"{device}'s {show_bytes(memory(device).total)} of memory"
        raise ResourceError(f"{what} did not fit into {held}: {way_out()}") from error


@contextlib.contextmanager
def full_float32() -> Generator[None]:
    """Have products in float32 keep all of its bits, whatever was allowed to this process beforehand (TF32)."""
    backends: Any = torch.backends  # whose types lack some of what is there
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    if all(precision in IEEE for precision in before):
        yield
        return
    try:
        word = torch.get_float32_matmul_precision()
    except RuntimeError:  # where the settings above were changed by themselves, this one has no word for them
        word = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(word)
        cuda.fp32_precision, cpu.fp32_precision = before
