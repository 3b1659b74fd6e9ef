"""What holds for every test: one thread, checked shapes, no network, the same examples in every run."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis.internal.conjecture import providers

import typechecks
from faults import Table

# Before torch is imported, and inherited by subprocesses: a change of thread count may change sums, and the workers of
# xdist would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Likewise: without a GPU, Triton's programs are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Before bytelm is imported: every annotated function checks the shapes and types of its arguments and its result.
typechecks.install()

# A session in the background ignores SIGINT, and so would the trainings that are to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Imported when all of this has been run: it imports bytelm, and torch, which `make pythons` does without.
pytest_plugins = ["processors"] if find_spec("torch") else []

# Every run tries the same examples, CI's and a developer's, so that what passes here passes there; whoever looks for
# others takes the profile "thorough" (`make nightly` does). That a machine is slow is no fault of a test.
SHARED: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    "print_blob": True,
}
hypothesis.settings.register_profile("same", **SHARED, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", **SHARED, max_examples=1000)
hypothesis.settings.load_profile("same")

# Hypothesis also draws constants of the modules of ours that are imported by then, which hangs on the tests before.
_ours, _none = providers._get_local_constants, providers.Constants()  # pyright: ignore[reportPrivateUsage]
providers._get_local_constants = lambda: _none if hypothesis.settings().derandomize else _ours()  # pyright: ignore


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's sockets reach this machine only, and no name is looked up."""
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "", "localhost", "127.0.0.1", "::1"):
        raise PermissionError(f"a test looked up the host {arguments[0]!r}: tests use no network")
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise PermissionError(f"a test connected to {host}: tests use no network")


sys.addaudithook(_refuse_network)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="write the fault table with the results of this run")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-table")
    if path is not None and not hasattr(config, "workerinput"):  # of several workers the one that hears of all
        config.pluginmanager.register(Table(path))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped and why, in a line each kind; pytest's own closing line comes after it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in sorted(reasons.items(), key=lambda kind: (-kind[1], kind[0])):
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
