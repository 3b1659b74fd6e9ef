"""One job at a time in a run; a dead one holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bytelm.checkpoint.lock import exclusive
from bytelm.errors import ResourceError

HOLDER = """
import sys
from pathlib import Path
from bytelm.checkpoint.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.fault("T10")
def test_a_second_job_is_told_of_the_first_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        told = rf"in use by pid {holder.pid} on host \S+: .*name another"
        with pytest.raises(ResourceError, match=told), exclusive(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with exclusive(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"pid {os.getpid()} on host ")
        with pytest.raises(ResourceError, match=f"pid {os.getpid()}"), exclusive(tmp_path):
            pass
    with exclusive(tmp_path):
        pass


@pytest.mark.fault("T10")
def test_the_lock_is_released_by_an_error_and_the_error_passes(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="inside"), exclusive(tmp_path):
        raise OSError("inside")
    with exclusive(tmp_path):
        pass


def test_the_lock_needs_a_system_that_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ResourceError, match="no fcntl"), exclusive(tmp_path):
        pass
