"""Accumulators of the inner loops stay in registers: compilers that move one to the stack halve the speed."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from bytelm.native import library

LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")
SOURCE = """
#include "matrix.h"
using namespace bytelm;
template <int C> void lines(const float* w, int64_t panel, const float* x, int64_t stride, int64_t count, float* out) {
    constexpr int V = WIDE;
    vec<float> total[C][V] = {};
    tile<C, V, 2>(w, PANEL, panel, x, stride, count, total);
    for (int c = 0; c < C; c++)
        for (int v = 0; v < V; v++) store(out + (c * V + v) * LANES<float>, total[c][v]);
}
template void lines<ROWS>(const float*, int64_t, const float*, int64_t, int64_t, float*);
"""

needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or not library.compilers(), reason="no C++ compiler for x86-64 here"
)


def inner_loops(assembly: str) -> list[list[str]]:
    """The instructions of loops that multiply vectors, without loops around them."""
    lines = [line.split("#")[0].strip() for line in assembly.splitlines()]
    labels = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    found: list[list[str]] = []
    for index, line in enumerate(lines):
        jump = re.fullmatch(r"j\w+\s+(\.\w+)", line)
        if jump and labels.get(jump[1], index) < index:
            body = [text for text in lines[labels[jump[1]] + 1 : index] if text and not text.startswith(".")]
            if sum("mulps" in text or "vfmadd" in text for text in body) > 1:
                found.append(body)
    return found


def stores(body: list[str]) -> list[str]:
    """The instructions that write to memory: in this syntax their last operand is an address."""
    moves = [text for text in body if re.match(r"v?mov", text)]
    return [text for text in moves if re.search(r"\([^()]*\)$", text)]


def compiled(tmp_path: Path, level: str, rows: str, wide: str, compiler: str) -> str:
    source = tmp_path / "loop.cpp"
    source.write_text(SOURCE.replace("ROWS", rows).replace("WIDE", wide))
    flags = [flag for flag in library.FLAGS if flag not in ("-shared", "-pthread")]
    line = [compiler, *flags, f"-march={level}", "-S", "-I", str(library.HERE), str(source), "-o", "-"]
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=300).stdout


@needs_compiler
@pytest.mark.parametrize("compiler", library.compilers()[:1])
@pytest.mark.parametrize("rows", ["1", "2", "MOST"])
@pytest.mark.parametrize("level", LEVELS)
def test_no_accumulator_is_stored_in_the_loop(tmp_path: Path, level: str, rows: str, compiler: str) -> None:
    loops = inner_loops(compiled(tmp_path, level, rows, "across_of(C)", compiler))
    assert loops
    assert not [text for body in loops for text in stores(body)]


@needs_compiler
def test_more_accumulators_than_registers_are_stored(tmp_path: Path) -> None:
    loops = inner_loops(compiled(tmp_path, "x86-64-v3", "6", "4", library.compilers()[0]))
    assert [text for body in loops for text in stores(body)]
