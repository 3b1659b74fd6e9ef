"""Parquet files are read in a process of their own: its end is one line about one file, and no other file suffers.

What made it so was found by fuzzing: pyarrow 26.0.1 ended the whole process (std::terminate, after an exception that
nothing caught) when it was asked for the metadata of a column of a damaged file, whose statistics of sizes contradicted
each other. That file is not kept; the stand-ins here end in ways of their own, and pyarrow is not asked any more.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytelm.data import apart
from bytelm.data.report import SourceReport
from bytelm.data.sources import documents
from bytelm.errors import DataError

ENDS = {"os.abort()": "SIGABRT", "os._exit(86)": "exit code 86", "os.kill(os.getpid(), 9)": "SIGKILL"}


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started for a test; none is left from others."""
    found: list[subprocess.Popen[bytes]] = []

    def popen(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        found.append(subprocess_popen(*words, **options))
        return found[-1]

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(apart, "_idle", [])
    monkeypatch.setattr(subprocess, "Popen", popen)
    return found


def written(folder: Path, name: str, *values: bytes) -> Path:
    pq.write_table(pa.table({"text": pa.array(values, pa.binary())}), folder / name)
    return folder / name


@pytest.mark.fault("D9")
@pytest.mark.parametrize("end", ENDS)
def test_a_library_that_ends_its_process_is_one_line(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The stand-in is found before the library, and ends its process when it is asked what is in a file."""
    path = written(tmp_path, "x.parquet", b"one")
    package = tmp_path / "library" / "pyarrow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("ArrowException = OSError\n")
    (package / "parquet.py").write_text(
        f"import os, sys\ndef read_metadata(file):\n    print('last words', file=sys.stderr, flush=True)\n    {end}\n"
    )
    with monkeypatch.context() as patched, pytest.raises(DataError) as caught:
        patched.syspath_prepend(tmp_path / "library")
        list(documents([path]))
    said = f"{path} cannot be read as a Parquet file (it crashed the reader: {ENDS[end]}): get a complete copy"
    assert str(caught.value) == said and capfd.readouterr() == ("", "")
    assert [b"".join(d.pieces) for d in documents([path])] == [b"one"]  # another process


@pytest.mark.fault("D9")
def test_a_reader_that_ends_between_rows_is_one_line(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    path = written(tmp_path, "x.parquet", *[np.random.default_rng(n).bytes(1 << 20) for n in range(20)])
    found = documents([path])
    next(found)
    started[0].send_signal(signal.SIGSEGV)
    with pytest.raises(DataError, match="it crashed the reader: SIGSEGV"):
        list(found)


def test_one_process_reads_file_after_file(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """One that is damaged or read half costs nothing of another; two at a time are read by two."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    paths = [written(tmp_path, f"{n}.parquet", *[b"%d" % n] * 3) for n in range(3)]
    report = SourceReport()
    assert len(list(documents(paths, report=report))) == 9 and report.files == 3
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        list(documents([tmp_path / "a.parquet"]))
    assert len(started) == 1 and started[0].poll() is None
    one, two = documents(paths), documents(paths)
    assert [b"".join(d.pieces) for pair in zip(one, two, strict=True) for d in pair][:2] == [b"0", b"0"]
    assert len(started) == 2
    half = documents(paths)
    next(half)
    half.close()
    assert sorted(process.poll() is None for process in started) == [False, True]


def test_a_process_that_waited_long_is_not_asked_again(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends by itself, so that a training of days does not keep it."""
    path = written(tmp_path, "x.parquet", b"one")
    assert len(list(documents([path]))) == 1
    monkeypatch.setattr(apart, "_IDLE", 0)
    assert len(list(documents([path]))) == 1
    assert [process.poll() is None for process in started] == [False, True]


def test_a_process_that_is_asked_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(apart, "_IDLE", 0.01)
        monkeypatch.setattr(sys, "argv", ["", "[]", str(theirs.fileno())])
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        apart.serve()


@pytest.mark.fault("T3")
def test_what_is_asked_of_us_is_not_asked_of_the_reader(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """Ctrl-C and what batch systems send come to our loops, which say when the reading ends."""
    path = written(tmp_path, "x.parquet", b"one", b"two")
    assert len(list(documents([path]))) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(started[0].pid, number)
    assert len(list(documents([path]))) == 2 and len(started) == 1
    assert os.getsid(started[0].pid) != os.getsid(0)


def test_the_reader_ends_with_us(tmp_path: Path) -> None:
    path = written(tmp_path, "x.parquet", b"one", b"two")
    code = (
        "import os, sys\nfrom bytelm.data import apart\nfrom bytelm.data.sources import documents\n"
        "list(documents(sys.argv[1:]))\nprint(apart._idle[0]._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    reader = Path(f"/proc/{int(run.stdout)}/cmdline")
    for _ in range(1000):
        if not reader.exists() or not reader.read_bytes():
            return
        signal.sigtimedwait([], 0.01)
    raise AssertionError("the reader goes on")
