"""The compiled kernels: prebuilt ones that a wheel has, or compiled once for this machine. If both fail, torch is used.

A wheel has kernels for the levels of a processor family (`LEVELS`), of which the best that this processor runs is
loaded. A source install compiles for the very processor at first use, and caches the result. The environment variable
BYTELM_KERNELS chooses otherwise: a level, "native" (compile for this processor) or "none" (torch alone).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from bytelm.errors import UsageError

VARIABLE = "BYTELM_KERNELS"
NATIVE, NONE = "native", "none"
# What kernels are compiled for, best last within a family, and the flags of compilers.
LEVELS = {
    "x86-64-v2": ("-march=x86-64-v2",),
    "x86-64-v3": ("-march=x86-64-v3",),
    "x86-64-v4": ("-march=x86-64-v4",),
    "x86-64-v4-bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "arm64": ("-march=armv8-a",),
}
SETS = dict(zip(LEVELS, ("SSE4.2", "AVX2", "AVX-512", "AVX-512 bf16", "NEON"), strict=True))
FAMILIES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
NAMES = ("kernels", "training", "online")
COMPILERS = ("g++", "clang++", "c++")  # what they compile is equally fast
# Nothing is contracted: sums are rounded as the sources say, so that processors agree.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")


class Found(NamedTuple):
    """A library, how it was made, and why there is no better one (or none at all); empty where it is the best."""

    library: ctypes.CDLL | None
    how: str
    why: str = ""


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A compiled library; None where there is none (`reason` says why). Raises UsageError for a bad BYTELM_KERNELS."""
    return _attempt(name).library


def reason(name: str) -> str:
    """Why there is no such library, in one line; empty where there is."""
    found = _attempt(name)
    return "" if found.library else found.why


def described(name: str) -> tuple[str, str]:
    """How a library was made, and why there is no better one, or none at all; empty where it is the best."""
    found = _attempt(name)
    return found.how, found.why


def arithmetic() -> Literal["fused", "separate"] | None:
    """How the loaded kernels round: those of one kind compute the same bits on every processor and system.

    "fused": a multiplication and an addition of vectors are rounded together, as on ARM and x86 from AVX2 on.
    "separate": each by itself, on older x86. None without kernels: what torch and numpy compute is this machine's.
    """
    found = library("kernels")
    return None if found is None else "fused" if found.bytelm_fused() else "separate"


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels that this processor and its system run, best last; empty where that is unknown."""
    family = FAMILIES.get(platform.machine().lower(), NONE)
    mine = [level for level in LEVELS if level.startswith(family)]
    for make in (partial(prebuilt, "level", "any"), *(partial(compiled, "level", command) for command in compilers())):
        try:
            return tuple(mine[: ctypes.CDLL(str(make())).bytelm_level()])
        except OSError:
            continue
    return ()


def prebuilt(name: str, level: str) -> Path:
    """A library of the wheel. Raises FileNotFoundError."""
    for file in PREBUILT.glob(f"{name}-{level}-{'?' * 16}{SUFFIX}"):  # the level, and a hash of the sources
        return file
    raise FileNotFoundError(f"this package has no {name} for {level}")


def compilers() -> list[str]:
    """The C++ compilers: what CXX says, or those that are found, the preferred one first."""
    given = os.environ.get("CXX")
    return [given] if given else [command for command in COMPILERS if shutil.which(command)]


@functools.cache
def _attempt(name: str) -> Found:
    if ctypes.sizeof(ctypes.c_void_p) != 8 or sys.byteorder != "little":
        return Found(None, NONE, "the kernels are written for 64-bit little-endian machines")
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", NATIVE, NONE, *LEVELS):
        raise UsageError(f"{VARIABLE}={asked}: give one of {', '.join((*LEVELS, NATIVE, NONE))}, or unset it")
    if asked == NONE:
        return Found(None, NONE, f"{VARIABLE}={NONE} says so")
    problems: list[str] = []
    if asked in LEVELS and levels() and asked != levels()[-1]:
        if asked not in levels():
            raise UsageError(f"{VARIABLE}={asked}: this processor runs {', '.join(levels())}; give one of them")
        problems.append(f"{VARIABLE} says so, and this processor runs {levels()[-1]}")
    for how, make in _candidates(name, asked):
        try:
            return Found(ctypes.CDLL(str(make())), how(), "; ".join(problems))
        except OSError as error:
            problems.append(str(error))
    return Found(None, NONE, "; ".join(problems))


def _candidates(name: str, asked: str) -> Iterator[tuple[Callable[[], str], Callable[[], Path]]]:
    """How a library may be had, best first: what to call it, and what makes it or raises OSError."""
    if asked == NATIVE or not PREBUILT.is_dir():
        yield from _compilations(name, asked or NATIVE)
        return
    best, *others = [asked] if asked else [*reversed(levels())] or [platform.machine()]
    yield lambda: f"prebuilt for {_shown(best)}", partial(prebuilt, name, best)
    yield from _compilations(name, asked or NATIVE)
    for level in others:
        yield partial("prebuilt for {}".format, _shown(level)), partial(prebuilt, name, level)


def _compilations(name: str, level: str) -> Iterator[tuple[Callable[[], str], Callable[[], Path]]]:
    goal = "this processor" if level == NATIVE else _shown(level)
    for command in compilers():
        yield lambda by=command: f"compiled for {goal} by {_version(by)}", partial(compiled, name, command, level)
    if not compilers():
        yield str, _no_compiler


def _no_compiler() -> Path:
    raise FileNotFoundError("no C++ compiler was found: install clang++ or g++, or set CXX")


def _shown(level: str) -> str:
    return f"{level} ({SETS[level]})" if level in SETS else level


def compiled(name: str, command: str, level: str = NATIVE) -> Path:
    """A shared library for this processor or a level, by this compiler, made if it is not there. Raises OSError.

    Tests compile for other levels, too, whose other paths this machine runs as well.
    """
    told = _run([command, "--version"], name)
    choices = (
        (("-march=native",), ()) if level == NATIVE else (LEVELS.get(level, (f"-march={level}",)),)
    )  # some compilers know no "native"
    parts = (fingerprint(name), str(choices), told, _processor() if level == NATIVE else level)
    target = _cache() / f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}{SUFFIX}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():
        print(f"compiling {name} for this machine (once, about ten seconds)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for flags in choices:
            try:
                _run([command, *FLAGS, *flags, "-I", str(HERE), str(HERE / f"{name}.cpp"), "-o", str(made)], name)
                break
            except OSError:
                if flags == choices[-1]:
                    raise
        made.replace(target)
    return target


def fingerprint(name: str) -> str:
    """A hash of the sources of a library and of the flags, in hexadecimal."""
    sources = (*sorted(HERE.glob("*.h")), HERE / f"{name}.cpp")
    text = "\0".join((*(source.read_text(encoding="utf-8") for source in sources), *FLAGS))
    return hashlib.sha256(text.encode()).hexdigest()


def _run(line: list[str], name: str) -> str:
    """What a compiler prints. Raises OSError, in one line."""
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=600).stdout
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise OSError(f"{line[0]} could not compile {name}.cpp: {told[-1]}") from error


def _version(command: str) -> str:
    """A compiler's name and version."""
    found = re.search(r"\d+(\.\d+)+", _run([command, "--version"], ""))
    return f"{Path(command).name} {found[0]}" if found else Path(command).name


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
