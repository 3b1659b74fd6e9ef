"""Build wheels with prebuilt kernels for several platforms: what `make wheels` runs, in an environment of its own.

    python tools/wheels.py --out dist                             every platform
    python tools/wheels.py --out dist manylinux_2_17_x86_64       some

The wheel of the sources comes first, py3-none-any, which compiles at first use. Each platform's is the same with
compiled libraries beside the sources, in bytelm/native/prebuilt. Zig's clang compiles for every platform on any
machine. The first time takes ten minutes, as Zig compiles its C++ library for each processor too, and keeps it.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from bytelm.native import library  # noqa: E402  (needs the line above; imports no torch)


class Platform(NamedTuple):
    """What is compiled for a wheel: Zig's name of the platform, the ending of its libraries, and its levels."""

    target: str
    suffix: str
    lowest: str
    """The processor that the library must run on that says which level the processor has."""
    levels: dict[str, str]


X86 = {
    "x86-64-v2": "x86_64_v2",
    "x86-64-v3": "x86_64_v3",
    "x86-64-v4": "x86_64_v4",
    "x86-64-v4-bf16": "x86_64_v4+avx512bf16",
}
PLATFORMS = {
    "manylinux_2_17_x86_64": Platform("x86_64-linux-gnu.2.17", ".so", "x86_64", X86),
    "manylinux_2_17_aarch64": Platform("aarch64-linux-gnu.2.17", ".so", "generic", {"arm64": "generic"}),
    "macosx_11_0_arm64": Platform("aarch64-macos.11.0", ".dylib", "apple_m1", {"arm64": "apple_m1"}),
    "win_amd64": Platform("x86_64-windows-gnu", ".dll", "x86_64", X86),
}


def main(arguments: Sequence[str]) -> None:
    """Build the wheels that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheels go")
    parser.add_argument(
        "platforms", nargs="*", metavar="PLATFORM", help=f"some of {', '.join(PLATFORMS)}; default: all"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.platforms) - set(PLATFORMS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: unknown; give some of {', '.join(PLATFORMS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = pure(Path(folder))
        shutil.copy(sources, options.out)
        print(options.out / sources.name)
        for tag in options.platforms or PLATFORMS:
            print(filled(sources, tag, Path(folder) / tag, options.out), flush=True)


def pure(folder: Path) -> Path:
    """The wheel of the sources, built from a copy: setuptools leaves files in the folder that it builds in."""
    copy = folder / "sources"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "prebuilt"))
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, copy)
    return next(folder.glob("*.whl"))


def filled(wheel: Path, tag: str, folder: Path, out: Path) -> Path:
    """A wheel with compiled libraries, for one platform."""
    run("wheel", "unpack", "-d", folder, wheel)
    content = next(folder.iterdir())
    compile_all(PLATFORMS[tag], content / "bytelm" / "native" / "prebuilt")
    about = next(content.glob("*.dist-info/WHEEL"))
    text = about.read_text(encoding="utf-8").replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    about.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{tag}"), encoding="utf-8")
    run("wheel", "pack", "-d", folder, content)
    return Path(shutil.copy(next(folder.glob("*.whl")), out))


def compile_all(platform: Platform, folder: Path) -> None:
    """Every library of a platform, for every level."""
    folder.mkdir()
    jobs = [("level", "any", platform.lowest)]
    jobs += [(name, level, cpu) for name in library.NAMES for level, cpu in platform.levels.items()]

    def make(name: str, level: str, cpu: str) -> None:
        built = f"{library.fingerprint(name)} {platform.target} {cpu} {version('ziglang')}"
        file = folder / f"{name}-{level}-{hashlib.sha256(built.encode()).hexdigest()[:16]}{platform.suffix}"
        flags = (*library.FLAGS, "-target", platform.target, f"-mcpu={cpu}", "-s", "-Wno-unused-command-line-argument")
        run("ziglang", "c++", *flags, "-I", library.HERE, library.HERE / f"{name}.cpp", "-o", file)

    make(*jobs[0])  # compiles the C++ library of the platform, which the others share
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: make(*job), jobs[1:]))
    for rest in (*folder.glob("*.lib"), *folder.glob("*.pdb")):  # for linking, which nobody does
        rest.unlink()


def run(module: str, *arguments: object) -> None:
    """Run a module's command; what it prints is shown if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main(sys.argv[1:])
