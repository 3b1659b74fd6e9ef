"""The fault table: what may fail, the expected behaviour, and the tests that verify it.

A test names the rows that it verifies: `@pytest.mark.fault("D1", "D2")`. `make faults` runs all of them, slow ones
too, and writes docs/faults.md: each row, its tests and outcomes. `tests/project/test_faults.py` checks that page.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PAGE = ROOT / "docs" / "faults.md"

SECTIONS = {
    "D": "Input data",
    "C": "Configuration",
    "T": "Training",
    "K": "Checkpoints",
    "M": "Results",
    "S": "Server",
    "P": "Process",
}

# row: (fault, expected behaviour)
HEAD = "| row | fault | expected behaviour | verified by (tests) | outcomes (test cases) |"
ROWS: dict[str, tuple[str, str]] = {
    "D1": (
        "an empty folder, or empty files alone",
        "one-line error, exit 3; an empty file among others is counted and skipped",
    ),
    "D2": ("a file shorter than a window or a patch", "trained on, padded; only real bytes are counted"),
    "D3": (
        "a file larger than memory (sparse, 200 GiB)",
        "scanned and read in bounded memory; holes are zeros",
    ),
    "D4": ("bytes that are not text: NUL, CRLF, BOM, all 256", "preserved byte for byte"),
    "D5": ("link loops, dangling links, pipes, sockets, devices", "skipped with a reason, without blocking"),
    "D6": ("an unreadable file", "skipped and named; with --strict an error; if all are unreadable, exit 3"),
    "D7": (
        "data modified during a run",
        "one-line error that names the change; no crash, no undetected change of data",
    ),
    "D8": (
        "a decompression bomb (gzip, bz2, xz, zst, archives, parquet, images, audio)",
        "refused, in bounded memory, exit 3",
    ),
    "D9": ("a corrupt image, clip, line or row", "skipped and counted up to data.max_bad (0.1 %), then an error"),
    "D10": ("names with line feeds, emoji, bytes that are not UTF-8", "read, and shown on one line"),
    "D11": ("contamination: the same bytes in training and held-out data", "a warning with the number of bytes"),
    "D12": ("pickled data, remote code", "always refused"),
    "C1": ("an unknown key, a wrong type, a misspelt preset", "one-line error with the nearest name and the source"),
    "C2": ("an invalid combination", "refused before data is read or a model built, all problems at once"),
    "C3": (
        "a training that needs more memory or disk than available",
        "refused with the estimate and the setting to change; --force overrides",
    ),
    "C4": (
        "resuming with another configuration",
        "the differences are listed; mutable settings change, others of [train] with --allow-change",
    ),
    "T1": (
        "a non-finite loss or gradient",
        "weights, moments and data order unchanged; ten consecutive ones end the run",
    ),
    "T2": (
        "a spike of the loss or the gradient norm",
        "the step is skipped, logged and counted, at most five consecutive ones; can be disabled",
    ),
    "T3": (
        "SIGINT, SIGTERM or SIGUSR1 at any stage",
        "progress is saved, exit 128 + the signal; a second signal exits at once, except under torchrun",
    ),
    "T4": (
        "kill -9 at any time",
        "the latest complete checkpoint loads; at most the time between two saves is lost",
    ),
    "T5": ("power loss during a save", "files, then names, are on disk before the old checkpoint is deleted"),
    "T6": ("resuming after an interruption", "weights, moments and losses bitwise identical to an uninterrupted run"),
    "T7": ("resuming with another number of processes", "the same order of data; losses equal up to rounding"),
    "T8": ("one of several processes dies or hangs", "the others exit and name it; run again to resume"),
    "T9": ("a full disk", "the previous checkpoint is intact, no partial files remain, one-line error, exit 5"),
    "T10": ("an unwritable run, two jobs in one run", "exit 5 and the lock's holder; a dead process holds no lock"),
    "T11": ("a clock that jumps, no terminal, closed output, LANG=C", "training continues"),
    "T12": ("an experiment tracker that fails", "reported once; training continues"),
    "T13": ("a memory leak", "memory is constant over two thousand steps"),
    "K1": (
        "a file truncated, corrupt, missing, swapped or extra",
        "named before a tensor is used; resuming falls back to an intact checkpoint and reports it",
    ),
    "K2": ("weights of another shape, dtype or name", "a table of the mismatches"),
    "K3": ("non-finite weights", "refused, with a count of the values by name"),
    "K4": ("an older or newer format", "older ones are read; newer ones are refused with the way out"),
    "K5": ("a pickle from outside", "read with an allow-list, by convert alone; nothing in it is executed"),
    "K6": ("a hostile safetensors file", "refused, in bounded memory"),
    "K7": ("a hostile configuration or state", "refused before anything is allocated"),
    "K8": (
        "the entropy model missing, or a different one",
        "a different one is refused with the way out; a missing one is trained again",
    ),
    "K9": (
        "a file of weights that is written to, cut short or deleted while rows of tables are read from it",
        "one-line error, exit 4; no crash; a deleted file stays readable",
    ),
    "K10": (
        "a model that needs more memory than is free",
        "refused before anything is loaded, with the options that make it fit",
    ),
    "M1": ("a prediction that depends on its target", "invariant: causality of every model and patcher"),
    "M2": ("a decoder that differs from the model", "invariant: equal in float64; incremental patching equals full"),
    "M3": ("a result that depends on the rest of the batch", "invariant: alone, in a batch, padded on either side"),
    "M4": (
        "probabilities or bits that do not add up",
        "checked: sum of 1, 8 bits for a uniform model, the chain rule, the harness",
    ),
    "M5": ("lossy compression", "files are restored exactly, in no more than their bits per byte and 64 bits"),
    "S1": (
        "no key or a wrong one, on any route: documentation, metrics, unknown paths, HEAD, OPTIONS",
        "401 from the outermost layer, comparison in constant time; /health alone is open; without a key only loopback "
        "addresses are listened to",
    ),
    "S2": (
        "a huge or endless body, endless headers, slow headers or bodies, deep JSON, numbers beyond limits",
        "400, 408, 413, 422 or 431, or the connection is closed; memory is bounded",
    ),
    "S3": ("a full queue", "429 with Retry-After at once; the queue is bounded"),
    "S4": (
        "a client that disconnects or does not read",
        "its work is cancelled within a step, its rows are free; reusable prefixes stay",
    ),
    "S5": (
        "SIGINT or SIGTERM",
        "/ready answers 503, new requests are refused, running ones finish or are cut after --drain seconds; exit 0; a "
        "second signal exits at once",
    ),
    "S6": ("an error inside a step of a model", "that request ends with 500 and an id, others continue"),
    "S7": ("generated bytes that are not UTF-8, split characters", "no broken event; `bytes_b64` is exact"),
    "S8": (
        "paths as model names, forged log lines, pages of other origins, DNS rebinding",
        "names come from a fixed table; a request is one line of the log, escaped, without prompts and keys; 403, 421",
    ),
    "S9": ("corrupt weights at start or while serving", "refused, with the file's name; the weights in use stay"),
    "S10": ("hours of mixed load", "memory, threads and file descriptors are constant"),
    "P1": ("an import with side effects", "no socket, file or process, no torch"),
    "P2": ("a test or a command that accesses the network", "the whole suite passes with the network disabled"),
    "P3": ("dependency creep", "a few core ones, pinned in the tested set, licences on a list"),
    "P4": ("a broken wheel", "built and installed in a clean environment, where the command runs"),
}


def marked() -> dict[str, list[str]]:
    """Row → the tests that say they prove it, as "folder/file.py::name", read from the sources."""
    found: dict[str, list[str]] = {row: [] for row in ROWS}
    for file in sorted(TESTS.rglob("test_*.py")):
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
                    found[row].append(f"{file.relative_to(TESTS).as_posix()}::{node.name}")
    return found


def _rows(node: ast.AST) -> Iterator[str]:
    """The rows named in `pytest.mark.fault(...)` anywhere in an expression."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "fault":
            yield from (argument.value for argument in call.args if isinstance(argument, ast.Constant))


def page(results: dict[str, Counter[str]] | None) -> str:
    """docs/faults.md; `results`: test → how often it passed, failed or was skipped."""
    lines = [
        "# Fault table: failures and how they are handled",
        "",
        "Every row has a fault, the expected behaviour and the tests that verify it (`tests/`). `make faults` runs all",
        "of them, slow ones too, and writes this page; the outcomes are those of its last run.",
    ]
    tests = marked()
    for letter, title in SECTIONS.items():
        lines += ["", f"## {title}", "", HEAD, "|---|---|---|---|---|"]
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
            name = f"{file.removeprefix('tests/')}::{test.partition('[')[0].rpartition('::')[2]}"
            self.results.setdefault(name, Counter())[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(page(self.results), encoding="utf-8")
