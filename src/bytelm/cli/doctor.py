"""The verb that looks at the machine: doctor."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from bytelm import machine
from bytelm.cli.common import Json, print_json
from bytelm.units import show_bytes

LITTLE_MEMORY, LITTLE_DISK = 2 << 30, 2 << 30  # bytes: less may not do for blt-tiny
FOR_USERS = {"bpe", "data", "eval", "hf", "logs", "media"}  # the extras that add something to the tool itself
Line = tuple[str, str, str]  # what, what there is, and what to do about it where it will not do


def doctor(*, json: Json = False) -> int:
    """Look at this machine: torch, cores, kernels, memory, disk, GPU, extras, and what to install or free.

    Example: bytelm doctor
    """
    lines = [*software(), *hardware(), *variables()]
    missing = {extra: packages for extra, packages in extras().items() if extra in FOR_USERS}
    if json:
        found = {what: {"found": there, "advice": advice} for what, there, advice in lines}
        print_json({**found, "extras": {extra: not packages for extra, packages in missing.items()}})
        return 0
    for extra, packages in missing.items():
        lack = f"no {', '.join(packages)}" if packages else "installed"
        lines.append((f"[{extra}]", lack, f"pip install 'bytelm[{extra}]'" if packages else ""))
    for what, there, advice in lines:
        print(f"{what:<11}{there}{f': {advice}' if advice else ''}")
    readme = next((name for name in ("README.md", "README.rst", "README") if Path(name).is_file()), None)
    print(f"Ready. Next: {f'bytelm train {readme} --minutes 2' if readme else 'bytelm demo'}")
    return 0


def software() -> Iterator[Line]:
    """Python, torch, the C++ compiler and what it made."""
    import torch

    from bytelm import __version__
    from bytelm.native.library import SOURCES, reason

    yield "bytelm", __version__, ""
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", ""
    yield (
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} {'thread' if torch.get_num_threads() == 1 else 'threads'}",
        "",
    )
    failed = next(filter(None, map(reason, SOURCES)), "")
    yield "kernels", "none: generation and training are slower" if failed else "compiled for this processor", failed


def hardware() -> Iterator[Line]:
    """Processor, memory, disk, GPU."""
    import torch

    from bytelm.train.loop import fast_on_cpu

    sets = ", ".join(machine.instruction_sets()) or "instruction sets not told"
    yield "processor", f"{machine.processor()}, {machine.cores()} cores; {sets}", ""
    yield "bfloat16", "multiplied by the processor" if fast_on_cpu() else "not multiplied here: float32 is used", ""
    memory = machine.memory()
    little = "close other programs, or use --set train.batch=4" if memory.free < LITTLE_MEMORY else ""
    yield "memory", f"{show_bytes(memory.free)} free of {show_bytes(memory.total)}", little
    free = machine.disk(Path.cwd())
    yield "disk", f"{show_bytes(free)} free here", "free some, or name a --run elsewhere" if free < LITTLE_DISK else ""
    if torch.cuda.is_available():
        sizes = torch.cuda.mem_get_info()
        yield "GPU", f"{torch.cuda.get_device_name()}, {show_bytes(sizes[0])} free of {show_bytes(sizes[1])}", ""
    else:
        idle = shutil.which("nvidia-smi") is not None
        yield "GPU", "none that torch can use", "there is one: install torch's CUDA build" if idle else ""


def variables() -> Iterator[Line]:
    """The variables of the environment that change what bytelm does."""
    told = sorted(name for name in os.environ if name.startswith("BYTELM_") or name in ("NO_COLOR", "OMP_NUM_THREADS"))
    yield "variables", ", ".join(f"{name}={os.environ[name]}" for name in told) or "none set", ""


def extras() -> dict[str, list[str]]:
    """Each extra, and the packages that it still wants."""
    found: dict[str, list[str]] = {}
    for requirement in requires("bytelm") or []:
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if package and extra:
            found.setdefault(extra[1], []).extend([] if installed(package[0]) else [package[0]])
    return dict(sorted(found.items()))


def installed(package: str) -> bool:
    """Whether a distribution is there."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
