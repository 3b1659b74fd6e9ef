"""The fault table: what may go wrong, what is promised, and the tests that prove it.

A test says which rows it proves: `@pytest.mark.fault("D1", "D2")`. `make faults` runs all of them, slow ones too, and
writes docs/faults.md: each row, its tests and how they ended. `tests/test_faults.py` holds the page to the marks.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "faults.md"

SECTIONS = {
    "D": "Input data",
    "C": "Configuration",
    "T": "Training",
    "K": "Checkpoints",
    "M": "Results",
    "P": "Process",
}

# row: (what goes wrong, what happens then)
ROWS: dict[str, tuple[str, str]] = {
    "D1": (
        "an empty folder, or empty files alone",
        "one line, exit 3; an empty file among others is counted and left out",
    ),
    "D2": ("a file shorter than a window or a patch", "it is trained on, padded; real bytes alone are counted"),
    "D3": (
        "a file larger than memory (sparse, 200 GiB)",
        "it is looked at and read in bounded memory; holes are zeros",
    ),
    "D4": ("bytes that are no text: NUL, CRLF, BOM, all 256", "what comes out is what went in, byte for byte"),
    "D5": ("link loops, dangling links, pipes, sockets, devices", "skipped with a reason, never waited for"),
    "D6": ("a file that may not be read", "skipped and named; with --strict an error; all of them, exit 3"),
    "D7": (
        "data that changes during a run",
        "one line that names the change; never a crash, never other data unnoticed",
    ),
    "D8": (
        "a file that swells (gzip, bz2, xz, zst, archives, parquet, pictures, sound)",
        "refused, in bounded memory, exit 3",
    ),
    "D9": ("a damaged picture, clip, line or row", "skipped and counted up to data.max_bad (0.1 %), then an error"),
    "D10": ("names with line feeds, emoji, bytes that are no UTF-8", "read, and shown on one line"),
    "D11": ("the same bytes in training and held-out data", "a warning that says how many"),
    "D12": ("pickled data, remote code", "refused, always"),
    "C1": ("an unknown key, a wrong type, a misspelt preset", "one line with the nearest name and the source of it"),
    "C2": ("an impossible combination", "refused before data is read or a model built, all problems at once"),
    "C3": (
        "a training that needs more memory or disk than there is",
        "refused with the estimate and the knob; --force",
    ),
    "C4": (
        "going on with another configuration",
        "the differences; what is free changes, other settings of [train] with --allow-change",
    ),
    "T1": (
        "a loss or gradient that is not finite",
        "weights, moments and data order untouched; ten in a row end the run",
    ),
    "T2": (
        "a spike of the loss or the gradient",
        "the step is left out, told and counted, five in a row at most; can be switched off",
    ),
    "T3": (
        "SIGINT, SIGTERM or SIGUSR1 at any stage",
        "what was done is kept, exit 128 and the signal; a second one leaves at once",
    ),
    "T4": (
        "kill -9 at any instant",
        "the newest complete checkpoint loads; at most the time between two saves is lost",
    ),
    "T5": ("power loss during a save", "files, then names, are on the disk before the old checkpoint goes"),
    "T6": ("going on after a stop", "the same weights, moments and losses as without it, bit for bit"),
    "T7": ("going on with another number of processes", "the same order of data; losses equal to rounding"),
    "T8": ("a process of several dies or hangs", "the others end with its name; the same command goes on"),
    "T9": ("a full disk", "the checkpoint before is intact, nothing half-written stays, one line, exit 5"),
    "T10": ("a run that cannot be written, two jobs in one", "exit 5 and who holds it; a dead holder holds nothing"),
    "T11": ("a clock that jumps, no terminal, closed output, LANG=C", "the training goes on"),
    "T12": ("a logger that fails", "said once; the training goes on"),
    "T13": ("a leak", "memory stays level over two thousand steps"),
    "K1": (
        "a file truncated, flipped, missing, swapped or extra",
        "named before a tensor is used; resuming falls back and says so",
    ),
    "K2": ("weights of another shape, dtype or name", "a table of the differences"),
    "K3": ("weights that are not finite", "refused, with a count of the values by name"),
    "K4": ("an older or newer format", "older ones are read; newer ones are refused with the way out"),
    "K5": ("a pickle from outside", "read with an allow-list, by convert alone; nothing in it is run"),
    "K6": ("a hostile safetensors file", "refused, in bounded memory"),
    "K7": ("a hostile configuration or state", "refused before anything is allocated"),
    "K8": (
        "the scorer of the patches missing, or another",
        "another is refused with the way out; a missing one is made again",
    ),
    "M1": ("a prediction that sees what it predicts", "a law holds every model and patcher: it never does"),
    "M2": ("a decoder that differs from the model", "a law: equal in float64; the patcher in pieces equals the whole"),
    "M3": ("a row that depends on its company", "a law: alone, in a batch, padded on either side"),
    "M4": (
        "probabilities or bits that do not add up",
        "they do: 1, 8 bits for a uniform model, the chain rule, the harness",
    ),
    "M5": ("a compressed file that does not come back", "it does, in no more than its bits per byte and 64 bits"),
    "P1": ("an import that does something", "no socket, file or process, no torch"),
    "P2": ("a test or a command that calls home", "the whole suite passes with the network closed"),
    "P3": ("dependencies that creep in", "a few core ones, pinned in the tested set, licences on a list"),
    "P4": ("a broken wheel", "built and installed in a clean environment, where the command runs"),
}


def marked() -> dict[str, list[str]]:
    """Row → the tests that say they prove it, as "file.py::name", read from the sources."""
    found: dict[str, list[str]] = {row: [] for row in ROWS}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        of_module = [
            row
            for node in module.body
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)
            for row in _rows(node.value)
        ]
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = [row for decorator in node.decorator_list for row in _rows(decorator)]
                for row in dict.fromkeys([*of_module, *own]):
                    found[row].append(f"{file.name}::{node.name}")
    return found


def _rows(node: ast.AST) -> Iterator[str]:
    """The rows named in `pytest.mark.fault(...)` anywhere in an expression."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "fault":
            yield from (argument.value for argument in call.args if isinstance(argument, ast.Constant))


def page(results: dict[str, Counter[str]] | None) -> str:
    """docs/faults.md; `results`: test → how often it passed, failed or was skipped."""
    lines = [
        "# What may go wrong, and what happens then",
        "",
        "Every row is a promise with the tests that prove it (`tests/`). `make faults` runs all of them, slow ones",
        "too, and writes this page; the figures are those of its last run.",
    ]
    tests = marked()
    for letter, title in SECTIONS.items():
        lines += ["", f"## {title}", "", "| | what goes wrong | what happens | proved by | |", "|---|---|---|---|---|"]
        for row, (fault, behaviour) in ROWS.items():
            if row.startswith(letter):
                shown = "<br>".join(f"`{test}`" for test in tests[row])
                counts: Counter[str] = sum(((results or {}).get(test, Counter()) for test in tests[row]), Counter())
                ended = ", ".join(f"{number} {how}" for how, number in sorted(counts.items()))
                lines.append(f"| {row} | {fault} | {behaviour} | {shown} | {ended} |")
    return "\n".join(lines) + "\n"


class Table:
    """The plugin of pytest that gathers results and writes the page at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            file, _, test = report.nodeid.partition("::")
            name = f"{Path(file).name}::{test.partition('[')[0].rpartition('::')[2]}"
            self.results.setdefault(name, Counter())[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(page(self.results), encoding="utf-8")
