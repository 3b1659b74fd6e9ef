"""The machine and its software."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from shutil import which

import torch

from bytelm import machine
from stages.bench import Bench, Found, Measurement

SECONDS, EACH = 20, 40
COLUMNS = ()
PACKAGES = ("triton", "numpy", "transformers", "tokenizers", "cyclopts", "beartype", "MEGABYTE-pytorch", "einops")


def versions() -> Found:
    found: Found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def card() -> Found:
    if not torch.cuda.is_available():
        return {"gpu": None}
    about = torch.cuda.get_device_properties(0)
    asked = "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
    told = subprocess.run([which("nvidia-smi") or "nvidia-smi", *asked], capture_output=True, text=True, check=False)
    driver = told.stdout.strip()
    return {"gpu": about.name, "capability": [about.major, about.minor], "gib": about.total_memory / 2**30} | {
        "multiprocessors": about.multi_processor_count,
        "driver": driver,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def doctor() -> Found:
    """What `bytelm doctor` says, which also tries the command line."""
    command = [sys.executable, "-m", "bytelm", "doctor"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    return {"code": told.returncode, "text": (told.stdout + told.stderr[-2000:]).splitlines()}


def measurements(bench: Bench) -> Iterator[Measurement]:
    yield "versions", versions
    yield "card", card
    yield "host", lambda: {"cores": machine.cores(), "cpu": machine.processor(), "gib": machine.memory().total / 2**30}
    yield "doctor", doctor
