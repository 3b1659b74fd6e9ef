"""How the tests run: the same examples for everybody, what is skipped is told, and the demo installs little."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parents[1]


def test_ci_and_developers_try_the_same_examples() -> None:
    """Derandomised, without a deadline, and no slow machine a failure; CI is one of the variables hypothesis asks."""
    code = "import conftest, hypothesis; print(hypothesis.settings())"
    told: list[str] = []
    for variables in ({}, {"CI": "1"}, {"GITHUB_ACTIONS": "true"}):
        environment = {name: value for name, value in os.environ.items() if name not in ("CI", "GITHUB_ACTIONS")}
        words = [sys.executable, "-c", code]
        run = subprocess.run(words, cwd=HERE, env=environment | variables, capture_output=True, text=True, check=True)
        told.append(run.stdout)
    assert len(set(told)) == 1
    assert "derandomize=True" in told[0] and "deadline=None" in told[0] and "too_slow" in told[0]


def test_examples_do_not_hang_on_what_other_tests_have_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis draws constants that it finds in the modules imported so far, of ours and not of libraries."""

    def tried() -> list[int]:
        seen: list[int] = []

        @settings(max_examples=300, derandomize=True, database=None)
        @given(st.integers())
        def check(number: int) -> None:
            seen.append(number)

        check()
        return seen

    before = tried()
    path = tmp_path / "ours.py"
    path.write_text(f"NUMBERS = {[7919 * i for i in range(1000, 1500)]}\n")
    spec = spec_from_file_location("ours_imported_later", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "ours_imported_later", module)
    assert tried() == before


SKIPPING = """
import pytest
@pytest.mark.parametrize("n", range(3))
def test_a(n): pytest.skip("no such tool")
@pytest.mark.skipif(True, reason="no such tool")
def test_b(): pass
@pytest.mark.skipif(True, reason="another machine")
def test_c(): pass
@pytest.mark.xfail
def test_d(): assert False
def test_e(): pass
"""


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_what_is_skipped_is_told_in_a_line_each_kind(workers: str, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_other.py").write_text('import pytest\npytest.importorskip("no_such_module")\n')
    words = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-n", workers, "--rootdir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    run = subprocess.run(
        [*words, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("skipped ")] == [
        "skipped 4: no such tool",
        "skipped 1: another machine",
        "skipped 1: could not import 'no_such_module': No module named 'no_such_module'",
    ]
    assert re.fullmatch(r"1 passed, 6 skipped, 1 xfailed in [\d.]+s( \(.*\))?", lines[-1])


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_the_demo_installs_the_core_alone_and_the_tests_the_rest(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(HERE.parent / name, tmp_path)

    def installs(target: str) -> list[str]:
        run = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        return re.findall(r"pip install .*?-e (\S+)", run.stdout)

    assert (installs("demo"), installs("test")) == (["."], [".", '".[dev]"'])
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".core").touch()
    assert (installs("demo"), installs("test")) == ([], ['".[dev]"'])
    (tmp_path / ".venv" / ".installed").touch()
    assert (installs("demo"), installs("test")) == ([], [])
    os.utime(tmp_path / "pyproject.toml")
    os.utime(tmp_path / ".venv" / ".core", (1, 1))
    assert (installs("demo"), installs("test")) == (["."], [".", '".[dev]"'])
