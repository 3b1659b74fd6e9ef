"""Compile a C++ file once for this machine, cache the result, and load it. If that fails, torch is used."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What each library is compiled from, its own file last.
SOURCES = {
    "kernels": ("vector.h", "threads.h", "matrix.h", "attention.h", "stack.h", "patches.h", "kernels.cpp"),
    "training": (
        "vector.h",
        "threads.h",
        "matrix.h",
        "pairs.h",
        "attend.h",
        "crossed.h",
        "pointwise.h",
        "training.cpp",
    ),
}
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
# Some compilers have another name for the processor they run on.
EXTRAS = (("-march={processor}",), ())


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A compiled library; None where there is no C++ compiler, or it fails (`reason` says which)."""
    return _attempt(name)[0]


def reason(name: str) -> str:
    """Why there is no such library, in one line; empty where there is."""
    return _attempt(name)[1]


@functools.cache
def _attempt(name: str) -> tuple[ctypes.CDLL | None, str]:
    if ctypes.sizeof(ctypes.c_void_p) != 8 or sys.byteorder != "little":
        return None, "the kernels are written for 64-bit little-endian machines"
    command = compiler()
    if command is None:
        return None, "no C++ compiler was found: install g++ or clang++, or set CXX"
    try:
        return ctypes.CDLL(str(compiled(name, command))), ""
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return None, f"{command} could not compile or load {name}.cpp: {told.strip().splitlines()[-1]}"


def compiler() -> str | None:
    """The C++ compiler: what CXX says, or one that is found; None where there is none."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def compiled(name: str, command: str, processor: str = "native") -> Path:
    """A shared library for this machine, source and compiler, made if it is not there. Raises SubprocessError.

    `processor` is what -march takes: tests compile for an older one too, whose other paths this machine runs as well.
    """
    here = Path(__file__).parent
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    text = "\0".join(
        [
            *(here.joinpath(file).read_text(encoding="utf-8") for file in SOURCES[name]),
            *FLAGS,
            str(EXTRAS),
            version,
            _processor() if processor == "native" else processor,
        ]
    )
    target = _cache() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():
        print(f"compiling {name} for this machine (once, about ten seconds)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / f"{name}.so"
        for extra in EXTRAS:
            flags = (flag.format(processor=processor) for flag in extra)
            line = [command, *FLAGS, *flags, "-I", str(here), str(here / f"{name}.cpp"), "-o", str(made)]
            try:
                subprocess.run(line, capture_output=True, text=True, check=True, timeout=600)
                break
            except subprocess.CalledProcessError:
                if extra == EXTRAS[-1]:
                    raise
        made.replace(target)
    return target


def _cache() -> Path:
    """Where compiled kernels are kept: the user's cache directory, or one of this process's user in the temporary."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bytelm"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="bytelm-"))


def _processor() -> str:
    """Identifies a machine that shares its home directory: kernels are compiled for the processor model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
