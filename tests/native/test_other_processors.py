"""The kernels as compiled for other processors: those that this machine runs, and ARM's by emulation.

selftest.cpp calls a library, without Python, and compares with what numpy computes (kernel_cases.py).
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernel_cases as cases
from bytelm.native import library
from bytelm.native.library import FLAGS, HERE, LEVELS

SELFTEST = Path(__file__).with_name("selftest.cpp")
WRITERS = {"kernels": cases.decoding, "training": cases.of_training}
CROSS = "aarch64-linux-gnu-g++"
FUSED = "x86-64-v3"  # the first level that multiplies and adds in one operation
QUICK = ["native", "x86-64-v2", "x86-64-v3"]  # each is compiled, once for a machine
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="selftest.cpp calls functions as other systems do")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The cases of each library."""
    folder = tmp_path_factory.mktemp("cases")
    for name, cases_of in WRITERS.items():
        cases_of().write(folder / name)
    return {name: folder / name for name in WRITERS}


def build(compiler: str, program: Path) -> Path:
    """The program, for the machine that a compiler compiles for."""
    subprocess.run([compiler, "-std=c++17", "-O1", str(SELFTEST), "-o", str(program), "-ldl"], check=True)
    return program


def check(line: list[str | Path]) -> list[str]:
    """Run the program: every comparison holds, and there were some. Returns a checksum of the bits of each result."""
    done = subprocess.run([*map(str, line), "bits"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *bits, last = done.stdout.splitlines()
    assert bits and re.fullmatch("0 of [1-9][0-9]* comparisons failed", last)
    return bits


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "level", QUICK + [pytest.param(level, marks=pytest.mark.slow) for level in LEVELS if level not in QUICK]
)
def test_kernels_for_a_level_compute_what_numpy_does(
    name: str, level: str, written: dict[str, Path], tmp_path: Path
) -> None:
    """Those of decoders bitwise the same at each level that fuses multiplications and additions."""
    if not library.compilers():
        pytest.skip("no C++ compiler")
    if level != "native" and level not in library.levels():
        pytest.skip(f"this processor does not run {level}")
    compiler = library.compilers()[0]
    program = build(compiler, tmp_path / "selftest")
    bits = check([program, library.compiled(name, compiler, level), written[name]])
    if name == "kernels" and level != FUSED and FUSED in library.levels():
        fuses = ctypes.CDLL(str(library.compiled(name, compiler, level))).bytelm_fused()
        reference = check([program, library.compiled(name, compiler, FUSED), written[name]])
        assert (bits == reference) == bool(fuses), different(bits, reference)


def different(bits: list[str], reference: list[str]) -> list[str]:
    """The results of which a build has other bits."""
    return [one for one, other in zip(bits, reference, strict=True) if one != other]


def test_a_wrong_number_and_a_wrong_bit_are_told(tmp_path: Path) -> None:
    """The program itself can fail, and says where."""
    if not library.compilers():
        pytest.skip("no C++ compiler")
    compiler = library.compilers()[0]
    bad, x = cases.Cases(), cases.np.arange(5.0)
    bad.near("off by one", x, x + (cases.np.arange(5) == 3), 1e-6)
    bad.near("not a number", x, x * cases.np.nan, 1e-6)
    bad.same("another bit", x, -x)
    bad.near("right", x, x.copy(), 0.0)
    bad.write(tmp_path / "bad")
    line = [build(compiler, tmp_path / "selftest"), library.compiled("level", compiler), tmp_path / "bad"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.endswith("3 of 4 comparisons failed\n")
    assert "off by one: number 3 is 3, the reference 4\n" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_kernels_for_arm_compute_what_numpy_does(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    """NEON's vectors on an emulated processor: what they compute, bitwise what x86 does, not how fast."""
    emulator = next(filter(shutil.which, EMULATORS), None)
    if emulator is None or shutil.which(CROSS) is None:
        pytest.skip("no emulator of ARM, or no compiler for it: apt install qemu-user-static g++-aarch64-linux-gnu")
    built = tmp_path / f"{name}.so"
    flags = [*FLAGS, *LEVELS["arm64"], "-I", str(HERE), str(HERE / f"{name}.cpp"), "-o", str(built)]
    subprocess.run([CROSS, *flags], check=True)
    program = build(CROSS, tmp_path / "selftest")
    bits = check([emulator, "-L", "/usr/aarch64-linux-gnu", program, built, written[name]])
    if name == "kernels" and FUSED in library.levels():
        compiler = library.compilers()[0]
        line = [build(compiler, tmp_path / "here"), library.compiled(name, compiler, FUSED), written[name]]
        assert bits == check(line), different(bits, check(line))
