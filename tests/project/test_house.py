"""The rules of the project: layers, sizes, the public surface, what import does, what the project says of itself.

`python tests/project/test_house.py --write` records the public surface anew, after a change of it that was meant.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bytelm import units

ROOT = Path(__file__).resolve().parents[2]
SURFACE = ROOT / "tests" / "surface.txt"
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 60
TEST_LINES = 500  # of a file of tests or benchmarks
DISTRIBUTIONS = {"PIL": "pillow"}  # packages that are imported by another name than they are installed by
WITH_TORCH = {"triton"}  # packages that torch brings along where it is built for a GPU


def read(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]


def walk() -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node of the sources, and the file it stands in."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(read(path))):
            yield name(path), node


def imported() -> Iterator[tuple[str, str]]:
    """Every absolute import of the sources: file, dotted module."""
    for file, node in walk():
        if isinstance(node, ast.Import):
            yield from ((file, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)


# --- the code ---------------------------------------------------------------------------------------------------------


def test_imports_go_down_only() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([linter, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_file_and_no_function_is_long() -> None:
    limits = dict.fromkeys(SOURCES, FILE_LINES)
    limits |= {path: TEST_LINES for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    long = [f"{name(p)}: {n} lines" for p, most in limits.items() if (n := len(read(p).splitlines())) > most]
    for file, node in walk():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES:
                long.append(f"{file}: {node.name} has {lines} lines")
    assert long == []


def test_every_file_says_what_it_is_for() -> None:
    assert [name(p) for p in SOURCES if read(p) and not ast.get_docstring(ast.parse(read(p)))] == []


def is_refused(node: ast.AST) -> bool:
    """A word by which data could carry code, or bytelm could reach the network."""
    if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
        return ast.unparse(node.value) != "False"
    if not isinstance(node, ast.Call):
        return False
    function = ast.unparse(node.func)
    unsafe_load = function == "torch.load" and "weights_only=True" not in map(ast.unparse, node.keywords)
    return unsafe_load or function in ("socket.socket", "socket.create_connection", "eval", "exec")


@pytest.mark.fault("K5", "D12")
def test_what_bytelm_reads_is_data() -> None:
    """No pickle in any dress, and nothing that fetches."""
    modules = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.hub"}
    modules |= {"pandas", "urllib.request", "http.client", "requests", "httpx", "huggingface_hub"}
    found = [
        f"{file} imports {dotted}"
        for file, dotted in imported()
        if any(f"{dotted}.".startswith(f"{m}.") for m in modules)
    ]
    found += [f"{file}: {ast.unparse(node)}" for file, node in walk() if is_refused(node)]
    assert found == []


# --- what import does -------------------------------------------------------------------------------------------------

WATCH = """
import json, sys
events = []
def hook(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.mkdir")):
        events.append(f"{event} {arguments}")
sys.addaudithook(hook)
import MODULE
print(json.dumps({"events": events, "torch": "torch" in sys.modules}))
"""


@pytest.mark.fault("P1")
@pytest.mark.parametrize("module", ["bytelm", "bytelm.cli", "bytelm.config", "bytelm.find", "bytelm.units"])
def test_import_does_nothing_and_loads_no_torch(module: str) -> None:
    run = subprocess.run(
        [sys.executable, "-B", "-c", WATCH.replace("MODULE", module)], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == {"events": [], "torch": False}


def test_every_public_name_is_there() -> None:
    """The lazy names of `bytelm` all resolve, and `dir` shows them."""
    import bytelm

    assert [public for public in bytelm.__all__ if not hasattr(bytelm, public)] == []
    assert set(bytelm.__all__) <= set(dir(bytelm))
    with pytest.raises(AttributeError):
        getattr(bytelm, "no_such_name")  # noqa: B009  # a type checker would refuse bytelm.no_such_name


def test_bytelm_train_is_called_as_documented_whatever_was_imported_before(tmp_path: Path) -> None:
    """The package of that name takes the function's place in `bytelm` as soon as anything of it is imported."""
    import bytelm

    settings = bytelm.configure(steps=1)
    with pytest.raises(bytelm.BytelmError, match="no such file or folder"):
        bytelm.train([tmp_path / "nothing"], settings, tmp_path / "run", quiet=True)


# --- the public surface -----------------------------------------------------------------------------------------------


def surface() -> list[str]:
    """Every exported name, and every command with its options: what users write, sorted."""
    import bytelm
    from bytelm.cli import app

    lines = [f"bytelm.{public}" for public in bytelm.__all__]

    def commands(command: Any, path: str) -> None:
        if command.default_command is not None:
            arguments = command.assemble_argument_collection()
            options = {option for argument in arguments for option in argument.names} - {"*"}  # of a group
            lines.append(" ".join([path, *sorted(options)]))
        for word in command:
            if not word.startswith("-"):
                commands(command[word], f"{path} {word}")

    commands(app, "bytelm")
    return sorted(lines)


def test_the_public_surface_is_the_recorded_one() -> None:
    assert surface() == SURFACE.read_text().splitlines(), "meant? then: python tests/project/test_house.py --write"


# --- what the project says of itself ----------------------------------------------------------------------------------


def requirements(extra: str | None = None) -> list[Requirement]:
    texts = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "bytelm"]


def pins() -> dict[str, str]:
    lines = read("constraints.txt").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_version_is_one() -> None:
    import bytelm

    assert bytelm.__version__ == PROJECT["version"]


@pytest.mark.fault("P3")
def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    everything = [r for extra in (None, *PROJECT["optional-dependencies"]) for r in requirements(extra)]
    assert [str(r) for r in everything if not r.specifier.contains(pinned.get(r.name, "0"))] == []
    assert [str(r) for r in requirements() if any(s.operator in ("<", "<=", "==", "~=") for s in r.specifier)] == []


@pytest.mark.fault("P3")
def test_every_third_party_import_is_a_declared_dependency() -> None:
    """And what is declared for users is imported: no dependency is carried for nothing."""
    used = (
        {dotted.partition(".")[0] for _, dotted in imported()} - set(sys.stdlib_module_names) - {"bytelm"} - WITH_TORCH
    )
    core = {r.name for r in requirements()}
    extras = {
        r.name
        for extra in PROJECT["optional-dependencies"]
        if extra not in ("bench", "dev", "docs")
        for r in requirements(extra)
    }
    used = {DISTRIBUTIONS.get(package, canonicalize_name(package)) for package in used}
    used |= {"httptools", "uvloop"}  # uvicorn imports them: its parser, and the faster event loop
    used |= {"adlfs", "gcsfs", "s3fs"}  # fsspec imports them
    assert used == core | extras


def closure(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """What is installed for these packages and what they need, without extras. A requirement not met is an error."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        package = metadata.distribution(wanted.name)
        assert wanted.specifier.contains(package.version, prereleases=True), (
            f"{package.name} {package.version}: {wanted}"
        )
        if canonicalize_name(wanted.name) not in found:
            found[canonicalize_name(wanted.name)] = package
            needed = map(Requirement, package.requires or [])
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


LICENCES = (
    r"MIT( License)?|Apache( Software License|-2\.0( WITH LLVM-exception)?)|BSD( License|-\d-Clause)?|0BSD|BSL-1\.0"
)
LICENCES += r"|PSF-2\.0|Zlib|CC0-1\.0"


@pytest.mark.fault("P3")
def test_what_is_installed_for_the_core_is_little_and_free() -> None:
    """At most eight packages by name; all they bring along fits together, and may be used by anybody for anything."""
    assert len(requirements()) <= 8
    found = closure(r.name for r in requirements())
    assert len([name for name in found if not name.startswith("nvidia")]) <= 30
    for name, package in found.items():
        said = package.metadata
        classes = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or [] if c.startswith("License ::")]
        terms = said.get("License-Expression") or " AND ".join(classes) or said.get("License")
        odd = [term for term in re.split(" AND | OR ", terms or "none") if not re.fullmatch(LICENCES, term)]
        assert odd == [] or name.startswith("nvidia"), f"{name}: {odd}"


def test_every_extra_that_is_named_exists() -> None:
    texts = [read(path) for path in [*SOURCES, *ROOT.glob("*.md"), "Makefile"]]
    named = {extra for text in texts for extra in re.findall(r"""(?:bytelm|\.)\[([a-z]+)\]["']""", text)}
    named |= {
        node.args[1].value
        for _, node in walk()
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("MissingExtraError")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    }
    assert named <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_pages_tell_the_set_up_that_is_used(page: str) -> None:
    text, makefile = read(page), read("Makefile")
    installs = {line.strip() for line in re.findall(r"pip install -e [^#\n`]*", text)}
    used = {line.strip() for line in re.findall(r"pip install -e .*", makefile)}
    assert installs <= used, f"{page} installs in another way than make does"
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|$|\s*#|\s{2,})", text, flags=re.MULTILINE)) <= targets
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.fault("P4")
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Built from a copy, as a build writes beside its sources."""
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist", "."]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("bytelm-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {entry for entry in archive.namelist() if ".dist-info/" not in entry}
    kinds = (".py", ".toml", ".json", ".h", ".cpp", ".html", ".css", ".js")
    package = [path for path in (ROOT / "src").rglob("*") if path.suffix in kinds or path.name == "py.typed"]
    assert held == {path.relative_to(ROOT / "src").as_posix() for path in package}
    assert "bytelm/py.typed" in held


@pytest.mark.fault("P4")
@pytest.mark.slow
def test_the_wheel_runs_in_a_clean_environment(tmp_path: Path) -> None:
    """What it needs is lent by this one; bytelm itself is there from the wheel alone, and its command trains."""
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist", "."]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "clean"], cwd=tmp_path, check=True)
    clean = tmp_path / "clean" / "bin" / "python"
    purelib = [clean, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(purelib, check=True, capture_output=True, text=True).stdout.strip()
    install = [sys.executable, "-m", "pip", "--python", clean, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # Its own folder comes first, and no editable install of this one is followed: only .pth files do that.
    lent = {**os.environ, "PYTHONPATH": os.pathsep.join([own, sysconfig.get_path("purelib")])}
    where = subprocess.run(
        [clean, "-c", "import bytelm; print(bytelm.__file__)"], env=lent, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(own)
    command = [
        clean.with_name("bytelm"),
        "train",
        ROOT / "LICENSE",
        "--preset",
        "byte-tiny",
        "--steps",
        "1",
        "--run",
        "r",
    ]
    subprocess.run(command, cwd=tmp_path, env=lent, check=True, capture_output=True)
    assert (tmp_path / "r" / "report.html").exists()


def test_ci_runs_what_a_developer_runs() -> None:
    assert re.findall(r"\bmake\b.*", read(".ci/run")) == ["make --no-print-directory test"]
    hooks = re.findall(r"entry: make (\w+)", read(".pre-commit-config.yaml"))
    (check,) = re.findall(r"^check: (.*)", read("Makefile"), flags=re.MULTILINE)
    assert hooks == check.split()


def test_shapes_and_types_are_checked_while_tests_run() -> None:
    assert units.show_bytes(684) == "684 B"
    with pytest.raises(jaxtyping.TypeCheckError):
        units.show_bytes("684")  # type: ignore[arg-type]


@pytest.mark.fault("P2")
def test_the_network_is_out_of_reach() -> None:
    with pytest.raises(PermissionError, match="tests use no network"), socket.socket() as there:
        there.connect(("192.0.2.1", 80))  # an address that is nobody's, for examples
    with pytest.raises(PermissionError, match="tests use no network"):
        socket.getaddrinfo("example.invalid", 80)


CALLS = """
import json, sys
calls = []
quiet = ("socket.gethostname",)  # asks nobody
def hook(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")) and event not in quiet:
        calls.append(f"{event} {arguments}")
sys.addaudithook(hook)
from bytelm.cli import run
for words in json.loads(sys.argv[1]):
    assert run(words) == 0, words
print(json.dumps(calls), file=sys.stderr)
"""


@pytest.mark.fault("P2")
def test_commands_open_no_socket(tmp_path: Path) -> None:
    import small

    run, out = tmp_path / "run", tmp_path / "out"
    guards = ["patching.max_length=none", "patching.max_single_byte_run=none"]  # there are none there
    words = ["train", str(ROOT / "LICENSE"), "--preset", "demo", "--run", str(run), "--steps", "2", "--quiet"]
    shape = [*small.BLT, "entropy_model.heads=2", "model.ngram_output=false", *small.TRAINED, *guards]
    sets = [word for s in shape for word in ("--set", s)]
    commands = [
        [*words, *sets],
        ["eval", str(run), str(ROOT / "README.md")],
        ["generate", str(run), "The", "--max-bytes", "4"],
        ["patches", str(run), "The byte"],
        ["report", str(run)],
        ["export", str(run), str(out), "--to", "hf"],
        ["convert", str(out), str(tmp_path / "again"), "--format", "hf"],
    ]
    asked = subprocess.run([sys.executable, "-c", CALLS, json.dumps(commands)], capture_output=True, check=False)
    assert asked.returncode == 0, asked.stderr.decode()
    assert json.loads(asked.stderr.splitlines()[-1]) == []


def test_the_checks_are_installed() -> None:
    """Nothing is skipped in silence because a tool is missing."""
    assert [
        tool
        for tool in (
            "beartype",
            "peft",
            "transformers",
            "zstandard",
            "PIL",
            "soundfile",
            "pyarrow",
            "datasets",
            "xdist",
        )
        if find_spec(tool) is None
    ] == []


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    SURFACE.write_text("\n".join(surface()) + "\n")
