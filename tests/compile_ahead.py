"""Compile every program of a GPU for one that is not here, as training calls it, and print what each takes.

`python tests/compile_ahead.py 90` prints JSON: a list of [program, constants, registers, bytes of spilled ones].
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bytelm.nn import device_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
Taken = list[tuple[str, dict[str, Any], int, int]]


class NoGPU:
    """A driver that knows what to compile for, and can launch nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compiled(capability: int) -> Taken:
    """Every program, at half the widths of models, in both kinds of numbers, and once with a count of one."""
    triton.runtime.driver.set_active(NoGPU(capability))
    found: Taken = []

    def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        binary = program.warmup(*arguments, grid=grid, **constants)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        registers, stack = (int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+)", told.stdout)[0])
        found.append((program.fn.__name__, constants, registers, stack))

    device_kernels.launch = launch
    for kind in (torch.float32, torch.bfloat16):
        for width in (12, 24, 256, 384, 1408, 2048):
            everything(64, width, kind)
    everything(1, 64, torch.bfloat16)
    return found


def everything(lines: int, width: int, kind: torch.dtype) -> None:
    """A call of each function, there and back."""
    x, weight = torch.randn(lines, 2 * width, dtype=kind).requires_grad_(), torch.ones(2 * width).requires_grad_()
    device_kernels.rms_norm(x, weight, 1e-5, torch.bfloat16).sum().backward()
    device_kernels.swiglu(x).sum().backward()
    heads = 1 if width % 16 else width // 16
    qkv = torch.randn(1, lines, 3, heads, 2 * width // heads, dtype=kind).requires_grad_()
    angles = torch.ones(1, lines, 1, width // heads)
    torch.autograd.backward(device_kernels.rotate_two(qkv, angles, angles), [torch.ones_like(qkv[:, :, 0])] * 3)
    device_kernels.rotate(qkv[:, :, 0], angles, angles).sum().backward()
    slots = torch.arange(lines)
    device_kernels.run_maxima(x, slots // 3, lines // 3 + 1).sum().backward()
    bytes = torch.randn(lines, heads, 2 * width // heads, dtype=kind).requires_grad_()
    patches = torch.randn(lines // 3 + 1, 2, *bytes.shape[1:], dtype=kind).requires_grad_()
    device_kernels.cross(patches, bytes, bytes, slots // 3).sum().backward()
    device_kernels.cross(bytes, patches, patches, slots // 3).sum().backward()
    ids = slots[None]
    known = {"OFFSET": 4, "PAD": 258, "VOCAB": 260}
    index = device_kernels.hashes(ids, ids == 0, ids[:, :2], lines, (5915587277, 3), (3, 2), **known)
    device_kernels.sum_rows(x, index[0])


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]))))
