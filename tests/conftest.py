"""What holds for every test: one thread, checked shapes, no network, the same random examples in every run of CI."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

from faults import Table

# Before torch is imported, and inherited by subprocesses: a change of thread count may change sums, and the workers of
# xdist would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Before bytelm is imported: every annotated function checks the shapes and types of its arguments and its result.
# The numeric tower: where a float is wanted an int will do, as type checkers have it and beartype by default has not.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook("bytelm", f"{__name__}.checked")

# A session in the background ignores SIGINT, and so would the trainings that are to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Imported when all of this has been run: it imports bytelm.
pytest_plugins = ["processors"]

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


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
