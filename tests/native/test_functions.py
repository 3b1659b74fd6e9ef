"""Exponential, logarithm, cosine and sine of the kernels: as near to the real numbers as functions.h says."""

from __future__ import annotations

import ctypes
import decimal
import math
import subprocess
from collections.abc import Callable, Iterator
from decimal import Decimal

import numpy as np
import pytest
from numpy.typing import NDArray

from bytelm.native import library

SOURCE = """
#include "functions.h"
using namespace bytelm;
template <class A> void exponentials(const A* x, int64_t n, A* out) {
    for (int64_t i = 0; i < n; i += LANES<A>) store(out + i, exponential(load(x + i)));
}
extern "C" {
void narrow_exponentials(const float* x, int64_t n, float* out) { exponentials(x, n, out); }
void wide_exponentials(const double* x, int64_t n, double* out) { exponentials(x, n, out); }
void logarithms(const double* x, int64_t n, double* out) { for (int64_t i = 0; i < n; i++) out[i] = logarithm(x[i]); }
void cosines(const double* x, int64_t n, double* out) { for (int64_t i = 0; i < n; i++) out[i] = Angle(x[i]).cosine; }
void sines(const double* x, int64_t n, double* out) { for (int64_t i = 0; i < n; i++) out[i] = Angle(x[i]).sine; }
}
"""
POINTS = 1600
Reals = NDArray[np.floating]

pytestmark = pytest.mark.skipif(not library.compilers(), reason="no C++ compiler")


def levels() -> list[str]:
    """This machine's, and one of each kind of arithmetic."""
    return ["native", *(level for level in ("x86-64-v2", "x86-64-v3") if level in library.levels())]


@pytest.fixture(scope="module", params=levels())
def functions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "functions.cpp").write_text(SOURCE)
    flags = ("-march=native",) if request.param == "native" else library.LEVELS[request.param]
    built = folder / "functions.so"
    line = [library.compilers()[0], *library.FLAGS, *flags, "-I", str(library.HERE)]
    subprocess.run([*line, str(folder / "functions.cpp"), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    """References have so many digits."""
    with decimal.localcontext(prec=60):
        yield


def called(library: ctypes.CDLL, name: str, x: Reals) -> Reals:
    out = np.empty_like(x)
    getattr(library, name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(len(x)), ctypes.c_void_p(out.ctypes.data))
    return out


def worst(found: Reals, x: Reals, of: Callable[[Decimal], Decimal]) -> float:
    """The largest error, in units in the last place of what is right."""
    ulp = math.ulp if x.dtype == np.float64 else lambda right: float(np.spacing(np.float32(right)))
    pairs = zip(found.tolist(), map(of, map(Decimal, x.tolist())), strict=True)
    return max(abs(float(Decimal(one) - right)) / ulp(abs(float(right))) for one, right in pairs)


def points(below: float, above: float, dtype: type[np.floating] = np.float64) -> Reals:
    """Half of them anywhere between, half near its end."""
    random = np.random.default_rng(0)
    spread = random.uniform(below, above, POINTS)
    spread[::2] = above - (above - below) * 2.0 ** -random.uniform(0, 30, POINTS // 2)
    return spread.astype(dtype)


@pytest.mark.parametrize(
    ("name", "below", "dtype"),
    [("narrow_exponentials", -87.0, np.float32), ("wide_exponentials", -708.0, np.float64)],
)
def test_exponentials(name: str, below: float, dtype: type[np.floating], functions: ctypes.CDLL) -> None:
    x = points(below, 0.0, dtype)
    assert worst(called(functions, name, x), x, Decimal.exp) < 1
    ends = np.array([0, -0.0, below, 2 * below, -np.inf, np.nan, 0, 0] * 2, dtype)
    found = called(functions, name, ends)
    assert (found[:2] == 1).all() and (found[2:5] == found[2]).all() and found[2] > 0 and np.isnan(found[5])


def test_logarithms(functions: ctypes.CDLL) -> None:
    x = np.concatenate([points(0, 300), points(0.5, 1), 1 / points(0.5, 1), points(0, 1e300)])
    x = x[x > 1e-300]
    assert worst(called(functions, "logarithms", x), x, Decimal.ln) < 1
    ends = called(functions, "logarithms", np.array([1, 0, np.inf, np.nan]))
    assert ends[0] == 0 and ends[1] == -np.inf and ends[2] == np.inf and np.isnan(ends[3])


def test_cosines_and_sines(functions: ctypes.CDLL) -> None:
    """In absolute terms: they are multiplied with numbers, and the results rounded to float32."""
    whole = np.random.default_rng(1).integers(0, 1 << 24, 800).astype(np.float64)
    right = np.arange(800) * (math.pi / 2)  # the nearest to multiples of a right angle: most of the argument is lost
    x = np.concatenate([whole, right, points(0, 100), points(0, 1 << 26)])
    of = [turned(Decimal(angle)) for angle in x.tolist()]
    for name, place in (("cosines", 0), ("sines", 1)):
        found = called(functions, name, x).tolist()
        errors = [abs(Decimal(one) - both[place]) for one, both in zip(found, of, strict=True)]
        assert float(max(errors)) < 1.5e-16, (name, x[int(np.argmax(errors))])


def turned(angle: Decimal) -> tuple[Decimal, Decimal]:
    """Its cosine and sine, by their series."""
    angle, term, sums = angle % (2 * PI), Decimal(1), [Decimal(0), Decimal(0)]
    for k in range(80):
        sums[k % 2] += term if k % 4 < 2 else -term
        term *= angle / (k + 1)
    return sums[0], sums[1]


def arctangent_of_inverse(n: int) -> Decimal:
    with decimal.localcontext(prec=60):
        return sum((Decimal((-1) ** k) / ((2 * k + 1) * Decimal(n) ** (2 * k + 1)) for k in range(50)), Decimal(0))


PI = 4 * (4 * arctangent_of_inverse(5) - arctangent_of_inverse(239))  # Machin
