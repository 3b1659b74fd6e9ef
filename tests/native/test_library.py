"""Which library is loaded: prebuilt or compiled, for which level, and what is said about it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bytelm.cli import app, doctor
from bytelm.errors import UsageError
from bytelm.native import library
from bytelm.native.library import LEVELS, SUFFIX

pytestmark = pytest.mark.skipif(not library.compilers(), reason="no C++ compiler")
HASH = "0123456789abcdef"
LOW, MIDDLE, BEST = "x86-64-v2", "x86-64-v3", "x86-64-v4"


def forget() -> None:
    library._attempt.cache_clear()
    library.library.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with prebuilt kernels for three levels, on a processor that runs all of them."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    source = tmp_path / "empty.cpp"
    source.write_text("")
    built = tmp_path / f"built{SUFFIX}"
    subprocess.run([library.compilers()[0], "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    for level in (LOW, MIDDLE, BEST):
        shutil.copy(built, folder / f"kernels-{level}-{HASH}{SUFFIX}")
    monkeypatch.setattr(library, "PREBUILT", folder)
    monkeypatch.setattr(library, "levels", lambda: (LOW, MIDDLE, BEST))
    return folder


def compilation(monkeypatch: pytest.MonkeyPatch, file: Path) -> list[str]:
    """Instead of compiling `file` is taken; the levels that were to be compiled for."""
    asked: list[str] = []

    def compiled(name: str, command: str, level: str) -> Path:
        asked.append(level)
        return file

    monkeypatch.setattr(library, "compiled", compiled)
    return asked


def test_the_best_prebuilt_library_is_taken(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compilation(monkeypatch, wheel / "none")
    found = library.library("kernels")
    assert found is not None and Path(found._name).name == f"kernels-{BEST}-{HASH}{SUFFIX}" and not asked
    assert library.described("kernels") == (f"prebuilt for {BEST} (AVX-512)", "")


def test_a_level_is_not_taken_for_one_whose_name_goes_on(wheel: Path) -> None:
    (wheel / f"kernels-{BEST}-{HASH}{SUFFIX}").rename(wheel / f"kernels-{BEST}-bf16-{HASH}{SUFFIX}")
    with pytest.raises(FileNotFoundError, match=f"no kernels for {BEST}$"):
        library.prebuilt("kernels", BEST)


def test_without_the_best_one_it_is_compiled_and_without_a_compiler_the_next_one_taken(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = wheel / f"kernels-{BEST}-{HASH}{SUFFIX}"
    made = best.rename(wheel / f"made{SUFFIX}")
    asked = compilation(monkeypatch, made)
    found = library.library("kernels")
    assert found is not None and found._name == str(made) and asked == ["native"]
    assert library.described("kernels")[0].startswith("compiled for this processor by ")
    forget()
    monkeypatch.setenv("PATH", "")
    assert library.library("kernels") is not None
    how, why = library.described("kernels")
    assert how == f"prebuilt for {MIDDLE} (AVX2)"
    assert why.startswith(f"this package has no kernels for {BEST}; no C++ compiler was found")


def test_the_variable_chooses(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compilation(monkeypatch, wheel / f"kernels-{BEST}-{HASH}{SUFFIX}")
    for value, how, why in (
        (LOW, f"prebuilt for {LOW} (SSE4.2)", f"BYTELM_KERNELS says so, and this processor runs {BEST}"),
        (BEST, f"prebuilt for {BEST} (AVX-512)", ""),
        ("none", "none", "BYTELM_KERNELS=none says so"),
    ):
        monkeypatch.setenv(library.VARIABLE, value)
        forget()
        assert library.described("kernels") == (how, why) and not asked
        assert (library.library("kernels") is None) == (value == "none") == bool(library.reason("kernels"))
    monkeypatch.setenv(library.VARIABLE, "native")
    forget()
    assert library.described("kernels")[0].startswith("compiled for this processor by ") and asked == ["native"]


@pytest.mark.parametrize("value", ["x86-64-v5", "arm64", "AVX2", "x86-64-v4-bf16"])
def test_a_level_that_is_unknown_or_does_not_run_is_refused(
    value: str, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.VARIABLE, value)
    with pytest.raises(UsageError, match=f"^BYTELM_KERNELS={value}: .*{LOW}, {MIDDLE}, {BEST}"):
        library.library("kernels")


def test_levels_are_those_of_this_processor() -> None:
    """By what the system says of it."""
    found = library.levels()
    assert found and found == tuple(level for level in LEVELS if level in found)
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        pytest.skip("the system does not say")
    for level, flag in {MIDDLE: "avx2", BEST: "avx512vl", "x86-64-v4-bf16": "avx512_bf16", "arm64": "asimd"}.items():
        assert (level in found) == (flag in flags), level


def test_a_compiler_that_fails_leaves_the_work_to_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = library.compilers()[0]
    monkeypatch.setattr(library, "compilers", lambda: ["/bin/false", works])
    monkeypatch.setattr(library, "_cache", lambda: tmp_path)
    library._attempt.cache_clear()
    assert library.library("level") is not None
    how, why = library.described("level")
    assert how.startswith(f"compiled for this processor by {works} ")
    assert why.startswith("/bin/false could not compile level.cpp: ")


def test_what_is_compiled_depends_on_the_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_cache", lambda: tmp_path)
    command, levels = library.compilers()[0], ("native", *library.levels())
    files = {library.compiled("level", command, level) for level in levels}
    assert len(files) == len(levels) == len(list(tmp_path.iterdir()))
    assert all(ctypes.CDLL(str(file)).bytelm_level() == len(library.levels()) for file in files)


def test_the_doctor_says_which_kernels_run(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    lines = {what: (there, advice) for what, there, advice in doctor.software()}
    assert lines["kernels"] == (f"prebuilt for {BEST} (AVX-512)", "")
    assert lines["training"][0].startswith("none: ") and "no training for" in lines["training"][1]


def test_no_command_has_an_option_that_the_variable_would_set() -> None:
    """BYTELM_QUIET is --quiet of every command: BYTELM_KERNELS must be nothing of the kind."""
    verbs = [verb for name in app if not name.startswith("-") and (verb := app[name]).default_command]
    options = {name for verb in verbs for argument in verb.assemble_argument_collection() for name in argument.names}
    assert "--quiet" in options and "--kernels" not in options
