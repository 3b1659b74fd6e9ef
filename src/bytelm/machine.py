"""The machine's resources: cores, instruction sets, memory, disk, within a container's limits; how threads wait."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# What kernels and torch ask for, and what Linux calls it.
SETS = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 bf16": "avx512_bf16", "AMX bf16": "amx_bf16", "NEON": "asimd"}

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables that say how OpenMP's threads wait
POLICY, SPINS = "GOMP_SPINCOUNT", 1000  # some microseconds


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory: what this process may use, and what of it is free."""

    total: int
    free: int


def processor() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Which of SETS the processor has; empty where the system does not say."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name, flag in SETS.items() if flag in flags]


def cores() -> int:
    """The cores that this process may use at a time."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    return min(mine, max(1, round(int(quota) / int(period)))) if quota.isdigit() and period else mine


def wait_without_spinning() -> None:
    """Have torch's threads sleep after some microseconds of waiting for each other, unless the user has chosen.

    By default they spin for milliseconds, which takes the processor from others, and from each other. It is read when
    torch is loaded, so later it changes nothing; the variable is that of GNU's OpenMP, which torch has on Linux.
    """
    if sys.platform == "linux" and "torch" not in sys.modules and not any(map(os.environ.get, WAITING)):
        os.environ[POLICY] = str(SPINS)


def spinning() -> bool:
    """Whether threads that wait may spin for long; where that is unknown they may."""
    spins = os.environ.get(POLICY, "").strip()
    asleep = os.environ.get("OMP_WAIT_POLICY", "").strip().upper() == "PASSIVE"
    return not (asleep or (spins.isdecimal() and int(spins) <= SPINS))


def memory() -> Memory:
    """Main memory. The page cache counts as free, as it is reclaimed on demand."""
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    found = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    total = found.get("MemTotal") or _pages()
    free = found.get("MemAvailable", total)
    limit, used = _read(CGROUP / "memory.max"), _read(CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        lines = (line.split() for line in _read(CGROUP / "memory.stat").splitlines())
        files = sum(int(words[1]) for words in lines if words[0] in ("inactive_file", "active_file"))
        total, free = min(total, int(limit)), min(free, int(limit) - int(used) + files)
    return Memory(total, max(0, free))


def _pages() -> int:
    """Bytes of main memory as the system counts them; 0 where it does not say, as on Windows."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def disk(path: Path) -> int:
    """Free bytes of the disk of `path`, which need not exist yet."""
    path = path.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    first = _read(Path("/proc/cpuinfo")).partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
