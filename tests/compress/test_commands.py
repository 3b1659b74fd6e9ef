"""Commands that are interrupted, killed, given twice or given what they cannot use; their work: test_resume.py."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bytelm.cli import run as cli
from bytelm.compress import stream, windows
from bytelm.compress.header import HEADER, SEAL, sealed
from bytelm.data import files
from bytelm.data.files import PositionWriter
from bytelm.errors import ResourceError
from bytelm.online import saved
from bytelm.online.memory import Memory


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Gives a command, and Ctrl-C once it has read the probe and two windows; its exit code."""

    def given(words: list[str]) -> int:
        read, times = windows.read, 0

        def pressed(*given: Any, known: bool) -> None:
            nonlocal times
            read(*given, known=known)
            times += 1
            if times == 3:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(windows, "read", pressed)
            return cli(words)

    return given


def test_after_ctrl_c_the_same_command_goes_on(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], interrupted: Callable[[list[str]], int]
) -> None:
    file, packed, restored = tmp_path / "part.txt", tmp_path / "part.txt.blm", tmp_path / "restored"
    file.write_bytes((run.parent / "notes.txt").read_bytes()[:900])
    assert cli(["compress", str(run), str(file), "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    for words, out in ((["compress", str(run), str(file)], packed), (["decompress", str(run), str(packed)], restored)):
        words = [*words, "--out", str(out), "--quiet"]
        capfd.readouterr()
        assert interrupted(words) == 130
        err, state = capfd.readouterr().err, out.with_name(out.name + ".state")
        assert "interrupted" in err and f"of 900 B are done, {state} has the state: the same command" in err
        assert state.exists() and not out.exists() and err.count("\n") == 1
        assert cli(words) == 0
        assert out.exists() and not state.exists() and not out.with_name(out.name + ".partial").exists()
    assert packed.read_bytes() == (tmp_path / "whole").read_bytes() and restored.read_bytes() == file.read_bytes()


def test_what_is_refused_leaves_a_state_as_it_was(
    run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted: Callable[[list[str]], int],
) -> None:
    """Another file of the same --out, and this one on a machine that rounds otherwise."""
    notes, kept = (run.parent / "notes.txt").read_bytes()[:900], [tmp_path / "x.state", tmp_path / "x.partial"]
    for name, data in (("long", notes), ("short", notes[:40])):
        (tmp_path / name).write_bytes(data)
        assert cli(["compress", str(run), str(tmp_path / name), "--quiet"]) == 0

    def words(name: str) -> list[str]:
        return ["decompress", str(run), str(tmp_path / f"{name}.blm"), "--out", str(tmp_path / "x"), "--quiet"]

    assert interrupted(words("long")) == 130
    before = [path.read_bytes() for path in kept]
    assert cli(words("short")) == 4 and [path.read_bytes() for path in kept] == before
    with monkeypatch.context() as patch:
        patch.setattr(stream, "probe", lambda model: 0)
        assert cli(words("long")) == 3 and [path.read_bytes() for path in kept] == before
    with closing(PositionWriter(kept[1], 900)):
        assert cli(words("long")) == 5
        assert f"{kept[1]} is written by another process: wait" in capfd.readouterr().err
    assert cli(words("long")) == 0 and (tmp_path / "x").read_bytes() == notes


def test_a_state_of_another_command_is_named_with_the_way_out(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], interrupted: Callable[[list[str]], int]
) -> None:
    file, packed, x = tmp_path / "file", tmp_path / "file.blm", tmp_path / "x"
    file.write_bytes((run.parent / "notes.txt").read_bytes()[:900])
    assert cli(["compress", str(run), str(file), "--quiet"]) == 0
    there = ["compress", str(run), str(file), "--out", str(x), "--quiet"]
    back = ["decompress", str(run), str(packed), "--out", str(x), "--quiet"]
    for words, other in ((there, back), (back, there)):
        assert interrupted(words) == 130
        kept = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
        capfd.readouterr()
        assert cli(other) == 4
        err, said = (
            capfd.readouterr().err,
            f"x.state is of an interrupted `bytelm {words[0]}` with this output: give that",
        )
        assert said in err and err.count("\n") == 1
        assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == kept
        assert cli(words) == 0
        x.unlink()
    assert interrupted(back) == 130
    (tmp_path / "x.partial").unlink()
    assert cli(back) == 4
    assert f"x.partial, of {x}.state, is missing: delete the state to start over" in capfd.readouterr().err


def test_an_output_is_one_commands_at_a_time(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command is given again while it works, and one writes the output while another loads its model."""
    from bytelm import lm

    file, read, learn, load = tmp_path / "file", windows.read, Memory.learn, lm.load
    file.write_bytes((run.parent / "notes.txt").read_bytes()[:900])
    packed, memory, codes = tmp_path / "file.blm", run / "memory.bin", list[int]()

    def meanwhile(work: Callable[..., Any], words: list[str]) -> Callable[..., Any]:
        def done(*given: Any, **named: Any) -> Any:
            codes.append(0)  # which stays where a command that is given meanwhile works, too
            codes[-1] = cli(words) if len(codes) == 1 else 0
            return work(*given, **named)

        return done

    x, elsewhere = tmp_path / "x", "choose another place with --out"
    for words, out, place, name, work, way_out in (
        (["compress", str(run), str(file)], packed, windows, "read", read, elsewhere),
        (["decompress", str(run), str(packed), "--out", str(x)], x, windows, "read", read, elsewhere),
        (["prime", str(run), "--memory", "2"], memory, Memory, "learn", learn, "prime a copy of the run"),
    ):
        words = [*words, "--quiet"]
        codes.clear()
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, meanwhile(work, words))
            assert cli(words) == 0 and codes[0] == 5 and out.exists()
        err = capfd.readouterr().err
        said = f"{out}.partial is written by another process: wait for it, or {way_out}\n"
        assert said in err and err.count("\n") == 1
        assert not out.with_name(out.name + ".partial").exists()

    def loaded(*given: Any, **named: Any) -> Any:
        (tmp_path / "y").write_bytes(b"another's")
        return load(*given, **named)

    monkeypatch.setattr(lm, "load", loaded)
    for words in (["compress", str(run), str(file)], ["decompress", str(run), str(packed)]):
        assert cli([*words, "--out", str(tmp_path / "y"), "--quiet"]) == 2
        assert "y already exists: name another file" in capfd.readouterr().err
        assert (tmp_path / "y").read_bytes() == b"another's"
        (tmp_path / "y").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.blm", "x"]


def test_what_a_killed_command_was_writing_is_cleared(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its state and of its output, and nothing else's."""
    (tmp_path / "[a]").write_bytes(b"line 7 of some notes")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        for name in ("[a].blm", "[a].blm.state", "[a]", "a.blm", "x[a].blm", "[a].blm.blm"):
            with pytest.raises(KeyboardInterrupt):
                files.write_whole(tmp_path / name, b"half of it")
    left = [path.name for path in tmp_path.glob("*.tmp")]
    cleared = [name for name in left if name.startswith("[a].blm.") and ".blm.blm" not in name]
    assert len(left) == 6 and len(cleared) == 2
    assert cli(["compress", str(run), str(tmp_path / "[a]"), "--quiet"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"[a]", "[a].blm", *left} - set(cleared)


def test_names_that_cannot_be_written_are_refused_at_once(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"some notes")
    for out, why in ((tmp_path / "none" / "x", "no folder"), (tmp_path / ("n" * 230), "")):
        for command in ("compress", "decompress"):
            assert cli([command, str(run), str(tmp_path / "file"), "--out", str(out)]) == 5
            assert f"cannot write {out} ({why}" in capfd.readouterr().err


@pytest.mark.parametrize("out", [".", "", "/"])
def test_a_folder_is_no_output_and_no_input(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "file").write_bytes(b"some notes")
    for command in ("compress", "decompress"):
        assert cli([command, str(run), str(tmp_path / "file"), "--out", out]) == 2
        assert f"{Path(out)} already exists: name another file with --out" in capfd.readouterr().err
    assert cli(["compress", str(run), out, "--quiet"]) == 3
    assert f"{Path(out)} is a folder: compress the files in it" in capfd.readouterr().err
    with pytest.raises(ResourceError, match=r"cannot write .* name another place"):
        files.write_whole(Path(out), b"")


@pytest.mark.parametrize("memory", ["nan", "inf", "0", "-1", "0.5", "65537"])
def test_a_size_of_memory_that_cannot_be_is_refused_as_it_was_given(
    run: Path, capfd: pytest.CaptureFixture[str], memory: str
) -> None:
    assert cli(["prime", str(run), "--memory", memory]) == 2
    assert f"usage: --memory {memory}: must be from 1 to 65536 MiB\n" in capfd.readouterr().err


def test_a_pipe_is_refused_with_the_way_out(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert cli(["compress", str(run), str(tmp_path / "pipe"), "--quiet"]) == 3
    assert f"pipe is a pipe, and a file is read twice: give - for standard input, with < {tmp_path}" in (
        capfd.readouterr().err
    )


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(b"short"), lambda file: os.utime(file, (1, 1))])
def test_a_file_that_changes_once_it_is_compressed_is_not_compared(
    run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], Any],
) -> None:
    file, write = tmp_path / "file", files.write_whole
    file.write_bytes(data := b"line 7 of some notes\n" * 9)

    def written(*given: Any) -> None:
        write(*given)
        change(file)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", written)
        assert cli(["compress", str(run), str(file)]) == 0
    out, err = capfd.readouterr()
    assert out.rstrip().endswith("bits/byte") and f"not compared with gzip, bzip2 and xz: {file} " in err
    assert out.count("\n") == err.count("\n") == 1
    assert cli(["decompress", str(run), str(tmp_path / "file.blm"), "--out", str(tmp_path / "x"), "--quiet"]) == 0
    assert (tmp_path / "x").read_bytes() == data


def test_a_partial_file_of_the_users_is_left(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"line 7 of some notes\n" * 9)
    assert cli(["compress", str(run), str(tmp_path / "file"), "--quiet"]) == 0
    for command, name in (("compress", "file"), ("decompress", "file.blm")):
        (tmp_path / "x.partial").write_bytes(b"the user's")
        assert cli([command, str(run), str(tmp_path / name), "--out", str(tmp_path / "x"), "--quiet"]) == 2
        err = capfd.readouterr().err
        assert "x.partial exists and is not of an interrupted command: move it away" in err and err.count("\n") == 1
        assert (tmp_path / "x.partial").read_bytes() == b"the user's" and not (tmp_path / "x").exists()


def test_nothing_is_left_of_a_damaged_file(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"line 7 of some notes\n" * 9)
    assert cli(["compress", str(run), str(tmp_path / "file"), "--quiet"]) == 0
    packed = bytearray((tmp_path / "file.blm").read_bytes()[SEAL.size :])
    packed[HEADER.size - 1] ^= 8  # the checksum of the content
    (tmp_path / "file.blm").write_bytes(sealed(bytes(packed)))
    assert cli(["decompress", str(run), str(tmp_path / "file.blm"), "--out", str(tmp_path / "x"), "--quiet"]) == 3
    assert "file.blm: decompression does not restore the input: it is damaged" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.blm"]


def test_a_memory_that_was_interrupted_is_the_same(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, file = ["prime", str(run), "--memory", "2", "--json"], run / "memory.bin"
    assert cli(words) == 0
    whole, learn = file.read_bytes(), Memory.learn

    def pressed(self: Memory, data: Any, logp: Any = None) -> None:
        learn(self, data, logp)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(saved, "PIECE", 7000)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "learn", pressed)
        assert cli(words) == 130
    assert f"{file}.state has the state: the same command continues" in capfd.readouterr().err
    assert cli([*words[:3], "3", "--quiet"]) == 4 and "of another file, run or option" in capfd.readouterr().err
    file.unlink()
    again: list[int] = []
    monkeypatch.setattr(
        Memory, "learn", lambda self, data, logp=None: (again.append(len(data)), learn(self, data, logp))
    )
    assert cli(words) == 0
    assert 0 < sum(again) < json.loads(capfd.readouterr().out)["read_bytes"], "what was read is not read again"
    assert file.read_bytes() == whole and not file.with_name("memory.bin.state").exists()
