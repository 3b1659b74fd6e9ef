"""The command that checks the environment: doctor."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from bytelm import machine
from bytelm.cli.common import Json, print_json
from bytelm.units import show_bytes

if TYPE_CHECKING:
    import torch

LITTLE_MEMORY, LITTLE_DISK = 2 << 30, 2 << 30  # bytes: less may be too little for blt-tiny
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
NETWORK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", OWN_STORE)
HANGS = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE")
FOR_USERS = {"bpe", "cloud", "data", "eval", "grammar", "hf", "logs", "media", "serve"}  # the extras that add features
Line = tuple[str, str, str]  # what, what was found, and what to do about it if anything


def doctor(*, json: Json = False) -> int:
    """Check the environment: torch, cores, kernels, memory, disk, GPUs, extras, and what to install or free.

    Example: bytelm doctor
    """
    if os.environ.get("RANK", "0") != "0":
        return 0  # the first of several processes speaks for all
    lines = [*software(), *hardware(), *gpus(), *launcher(), *variables()]
    missing = {extra: packages for extra, packages in extras().items() if extra in FOR_USERS}
    if not installed("bytelm"):
        lines.append(("extras", "unknown: bytelm runs from a source tree", "pip install -e . in it"))
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
    """Python, torch and the compiled kernels."""
    import torch

    from bytelm import __version__
    from bytelm.native.library import NONE, described

    yield "bytelm", __version__, ""
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", ""
    yield (
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} {'thread' if torch.get_num_threads() == 1 else 'threads'}",
        "",
    )
    generation, training = described("kernels"), described("training")
    for what, (how, why) in {"kernels": generation, "training": training}.items():
        if what == "kernels" or training[0] != generation[0]:
            yield what, "none: generation and training are slower" if how == NONE else how, why


def hardware() -> Iterator[Line]:
    """Processor, memory, disk."""
    from bytelm.training.loop import fast_on_cpu

    sets = ", ".join(machine.instruction_sets()) or "instruction sets unknown"
    yield "processor", f"{machine.processor()}, {machine.cores()} cores; {sets}", ""
    yield "bfloat16", "native" if fast_on_cpu() else "no native support: float32 is used", ""
    memory = machine.memory()
    little = "close other programs, or use --set train.batch=4" if memory.free < LITTLE_MEMORY else ""
    yield "memory", f"{show_bytes(memory.free)} free of {show_bytes(memory.total)}", little
    free = machine.disk(Path.cwd())
    yield "disk", f"{show_bytes(free)} free here", "free some, or name a --run elsewhere" if free < LITTLE_DISK else ""


def gpus() -> Iterator[Line]:
    """One line per GPU that --device can name, and one for what they have in common."""
    import torch

    from bytelm.device import memory, there

    cards = [torch.device(name) for name in there() if name != "cpu"]
    for card in cards:
        cuda, size = card.type == "cuda", memory(card)
        told = reported(card) if cuda else "Apple's, used only with --device mps"
        yield str(card), f"{told}, {show_bytes(size.free)} free of {show_bytes(size.total)}", ""
    if not torch.cuda.is_available():
        idle = shutil.which("nvidia-smi") is not None
        yield "GPU", "none that torch can use", "there is one: install torch's CUDA build" if idle else ""
        return
    triton = version("triton") if installed("triton") else "not installed"
    precise = torch.backends.cuda.matmul.fp32_precision != "tf32"
    float32 = "in float32" if precise else "in TF32, except entropy models"
    yield "CUDA", f"{torch.version.cuda}, driver {driver()}, Triton {triton}; float32 matmuls {float32}", ""
    yield "GPU kernels", *gpu_kernels()


def gpu_kernels() -> tuple[str, str]:
    """The kernels used besides matmuls on a GPU, and what would make them faster."""
    from bytelm.nn import fused, runs

    attention = "variable-length attention" if runs.present("cuda") else "masked attention"
    if fused.triton_kernels() is None:
        return f"{attention}, plain torch", "install triton, and a C compiler for it" if not installed("triton") else ""
    return f"{attention}, Triton kernels", ""


def reported(card: torch.device) -> str:
    """A GPU's name, compute capability, and whether it has native bfloat16."""
    import torch

    major, minor = torch.cuda.get_device_capability(card)
    with torch.cuda.device(card):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    bfloat16 = "bfloat16" if fast else "no bfloat16: float32 is used"
    return f"{torch.cuda.get_device_name(card)}, capability {major}.{minor}, {bfloat16}"


def driver() -> str:
    """The version of NVIDIA's driver, from nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found[0] if found else "unknown"


def variables() -> Iterator[Line]:
    """The environment variables that affect bytelm, that of waiting threads included, which the command line sets."""
    known = ("NO_COLOR", "OMP_NUM_THREADS", *machine.WAITING, *NETWORK, *HANGS)
    told = sorted(name for name in os.environ if name.startswith("BYTELM_") or name in known)
    yield "variables", ", ".join(f"{name}={os.environ[name]}" for name in told) or "none set", ""


def launcher() -> Iterator[Line]:
    """What a process under torchrun sees of its settings, and those that are missing; nothing without it."""
    from bytelm.training.stop import ELASTIC, SIGNALS

    if ELASTIC not in os.environ:
        return
    value = os.environ.get
    restarts, hosts = value("TORCHELASTIC_MAX_RESTARTS", "0"), value("GROUP_WORLD_SIZE", "1")
    advice = "" if restarts != "0" else "add --max-restarts 3, or the training ends with the first process that is lost"
    yield "torchrun", f"{value('WORLD_SIZE')} processes on {hosts} of its hosts, {restarts} restarts", advice
    handled = value("TORCHELASTIC_SIGNALS_TO_HANDLE", "").split(",")
    missing = [number.name for number in SIGNALS if number.name not in handled]
    wanted = ",".join([*handled, *missing])
    advice = f"add --signals-to-handle {wanted}, or {', '.join(missing)} orphans the processes" if missing else ""
    yield "signals", ",".join(handled), advice
    shared = value(OWN_STORE) != "1"
    several = hosts != "1" or restarts != "0"
    why = "a restart may meet addresses of the attempt before it, and a host that is started again cannot rejoin"
    advice = f"set {OWN_STORE}=1, or {why}" if shared and several else ""
    yield "store", "shared by all attempts" if shared else "each attempt has one", advice
    grace = value("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    yield "grace", f"{grace} s from SIGTERM to SIGKILL unless --shutdown-timeout changes it", ""


def extras() -> dict[str, list[str]]:
    """Each extra, and its missing packages; empty if bytelm runs from a source tree."""
    found: dict[str, list[str]] = {}
    for requirement in (requires("bytelm") or []) if installed("bytelm") else []:
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if package and extra:
            found.setdefault(extra[1], []).extend([] if installed(package[0]) else [package[0]])
    return dict(sorted(found.items()))


def installed(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
