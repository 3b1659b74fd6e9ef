"""Work that was interrupted, killed or read elsewhere: the same file comes of it, or an error that says why not."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytelm import machine
from bytelm.cli import run as cli
from bytelm.compress import lanes, stream, windows
from bytelm.compress.header import HEADER, LONGEST, opened
from bytelm.compress.resume import Resume, Stopped
from bytelm.compress.stream import compress, decode, decompress, encode
from bytelm.compress.windows import Held, Plain
from bytelm.data import files
from bytelm.data.files import PositionWriter
from bytelm.errors import CheckpointError, DataError, ResourceError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.testing import tiny_models

SMALL = Settings(memory=1 << 20)
DATA = np.random.default_rng(0).choice(np.frombuffer(b"the cat sat on a mat. ", np.uint8), 500).tobytes()
KINDS = pytest.mark.parametrize(("memory", "streams"), [(None, 1), (None, 3), (SMALL, 1), (SMALL, 3)])


@pytest.fixture(scope="module")
def model() -> ByteModel:
    return next(model for name, model in tiny_models() if name.startswith("megabyte (two")).eval()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHECK", 60)


def memory_of(settings: Settings | None) -> Memory | None:
    return settings and Memory(settings)


def until_done(path: Path, work: Callable[[Resume], Any]) -> tuple[Any, int]:
    """What work gives that is interrupted after each window, and how often it was."""
    for times in range(1000):
        try:
            found = work(Resume(path, lambda: True))
        except Stopped:
            continue
        return found, times
    raise AssertionError("the work does not come to its end")


@pytest.mark.fault("M5")
@KINDS
def test_what_is_interrupted_everywhere_is_the_same(
    model: ByteModel, tmp_path: Path, memory: Settings | None, streams: int
) -> None:
    (tmp_path / "file").write_bytes(DATA)
    whole = compress(model, DATA, 64, memory=memory_of(memory), streams=streams)
    assert opened(model, whole)[0].lanes == streams

    def there(resume: Resume) -> bytes:
        source = Plain(tmp_path / "file", len(DATA))
        return encode(model, source, len(DATA), 64, None, memory_of(memory), streams, resume)

    def back(resume: Resume) -> bytes:
        with closing(PositionWriter(tmp_path / "restored", len(DATA))) as target:
            decode(model, whole, target, None, memory_of(memory), resume)
        return (tmp_path / "restored").read_bytes()

    packed, times = until_done(tmp_path / "there", there)
    restored, again = until_done(tmp_path / "back", back)
    assert packed == whole and restored == DATA and times == again == -(-len(DATA) // streams // 32) - 1 > 3


@pytest.mark.parametrize("memory", [None, SMALL])
def test_what_is_killed_goes_on_from_its_last_state(model: ByteModel, tmp_path: Path, memory: Settings | None) -> None:
    read = 0

    def killed(more: int) -> None:
        nonlocal read
        read += more
        if read > 300:
            raise KeyboardInterrupt

    source, path, told = Held(np.frombuffer(DATA, np.uint8)), tmp_path / "state", list[int]()
    with pytest.raises(KeyboardInterrupt):
        encode(model, source, len(DATA), 64, killed, memory_of(memory), 1, Resume(path, every=0))
    packed = encode(model, source, len(DATA), 64, told.append, memory_of(memory), 1, Resume(path))
    assert packed == compress(model, DATA, 64, memory=memory_of(memory), streams=1)
    assert told[0] == 288 and sum(told) == len(DATA), "what was done is not done again, and counted"


def test_a_state_of_other_work_and_a_damaged_one_are_refused(model: ByteModel, tmp_path: Path) -> None:
    path = tmp_path / "state"

    def work(data: bytes = DATA, memory: Memory | None = None) -> bytes:
        source = Held(np.frombuffer(data, np.uint8))
        return encode(model, source, len(data), 64, None, memory, 1, Resume(path, lambda: True))

    with pytest.raises(Stopped, match="saved after 32 bytes"):
        work()
    for other in (lambda: work(DATA[1:]), lambda: work(DATA, Memory(SMALL))):
        with pytest.raises(CheckpointError, match=r"state is of another file, run or option: delete .*state to start"):
            other()
    state = path.read_bytes()
    for at in (len(state) - 3, state.index(b"low") + 9, state.index(b'"place"') + 10, state.index(b"numbers")):
        damaged = bytearray(state)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="state is damaged: delete"):
            work()
    path.write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="no state of this work that can be read: delete"):
        work()


@KINDS
def test_other_predictions_are_noticed_at_once(
    model: ByteModel, monkeypatch: pytest.MonkeyPatch, memory: Settings | None, streams: int
) -> None:
    """Ones that would not even be decoded otherwise: of a byte that does not come."""
    packed, seen, done = compress(model, DATA, 64, memory=memory_of(memory), streams=streams), 0, 0
    name = "frequencies" if memory is None else "among_bytes"
    exactly = getattr(lanes, name)

    def otherwise(logits: np.ndarray) -> np.ndarray:
        nonlocal seen
        seen, found = seen + 1, exactly(logits)
        if seen == 70:
            found[0, 255] += 1 if memory is None else 1e-6
        return found

    def count(more: int) -> None:
        nonlocal done
        done += more

    monkeypatch.setattr(lanes, name, otherwise)
    with pytest.raises(DataError, match=r"does not restore the input: it is damaged, or was compressed by another"):
        decompress(model, packed, count, memory_of(memory))
    assert 0 < done < len(DATA)


def test_streams_cost_what_they_do_not_know_of_each_other(model: ByteModel) -> None:
    text = b"the cat sat on the mat, and the hat. " * 20
    sizes = []
    for streams in (1, 2, 5):
        packed = compress(model, text, 64, memory=Memory(SMALL), streams=streams)
        assert decompress(model, packed, memory=Memory(SMALL)) == text
        sizes.append(len(packed))
        with pytest.raises(DataError):
            decompress(model, packed[:-9], memory=Memory(SMALL))
    assert sizes[0] < sizes[1] < sizes[2]
    for streams in (0, 65):
        with pytest.raises(UsageError, match=f"streams {streams}: must be from 1 to 64 for 740 bytes"):
            compress(model, text, 64, streams=streams)
    with pytest.raises(UsageError, match="streams 3: must be from 1 to 2 for 2 bytes"):
        compress(model, b"ab", 64, streams=3)


def test_a_header_that_claims_much_takes_no_more_room_than_its_file_can_fill(
    model: ByteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, open_decoder, room = compress(model, DATA, 64, streams=1), windows.open_decoder, list[int]()
    header, _ = opened(model, packed)
    damaged = replace(header, context=LONGEST - 1).pack() + packed[len(header.pack()) :]

    def counted(model: ByteModel, *, rows: int, capacity: int) -> Any:
        room.append(rows * capacity)
        return open_decoder(model, rows=rows, capacity=capacity)

    monkeypatch.setattr(windows, "open_decoder", counted)
    with pytest.raises(DataError):
        decompress(model, damaged)
    assert max(room) == len(DATA) + 1

    def full(*given: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(windows, "open_decoder", full)
    with pytest.raises(ResourceError, match="context 64, 1 streams: no room for what the model keeps"):
        compress(model, DATA, 64, streams=1)
    monkeypatch.setattr(np, "zeros", full)
    with pytest.raises(ResourceError, match="no room in memory for the 500 bytes that its header names: get"):
        decompress(model, packed)


def resident() -> int:
    """Bytes of main memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_header_that_claims_a_large_memory_is_refused_before_that_is_filled(
    model: ByteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, room = compress(model, DATA, 64, memory=Memory(SMALL), streams=3), machine.Memory(1 << 40, 1 << 40)
    header, _ = opened(model, packed)
    monkeypatch.setattr(machine, "memory", lambda: room)
    claimed, before = Memory(Settings(memory=8 << 30)), resident()
    with pytest.raises(DataError, match="the online memory that it was compressed with was another"):
        decompress(model, replace(header, memory=8 << 30).pack() + packed[len(header.pack()) :], memory=claimed)
    assert resident() - before < 1 << 29 < claimed.bytes
    room = machine.Memory(1 << 40, claimed.bytes - 1)
    with pytest.raises(ResourceError, match=r"no room for 7.01 GB of online memory, 7.01 GB are free: free some, or"):
        Memory(claimed.settings)
    small = Memory(SMALL)
    room = machine.Memory(1 << 40, 2 * small.bytes - 1)
    with pytest.raises(ResourceError, match=r"no room for .* of online memory"):
        decompress(model, packed, memory=small)
    assert decompress(model, compress(model, DATA, 64, memory=Memory(SMALL)), memory=small) == DATA


# --- the commands ---


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

    x = tmp_path / "x"
    for words, out, place, name, work in (
        (["compress", str(run), str(file)], packed, windows, "read", read),
        (["decompress", str(run), str(packed), "--out", str(x)], x, windows, "read", read),
        (["prime", str(run), "--memory", "2"], memory, Memory, "learn", learn),
    ):
        words = [*words, "--quiet"]
        codes.clear()
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, meanwhile(work, words))
            assert cli(words) == 0 and codes[0] == 5 and out.exists()
        err = capfd.readouterr().err
        assert f"{out}.partial is written by another process: wait for it" in err and err.count("\n") == 1
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


def test_a_partial_file_that_was_moved_before_it_is_locked_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, times = files._locked, 0  # pyright: ignore[reportPrivateUsage]

    def late(file: FileIO) -> bool:
        nonlocal times
        times += 1
        if times == 1:
            (tmp_path / "x.partial").rename(tmp_path / "x")
        return lock(file)

    monkeypatch.setattr(files, "_locked", late)
    with closing(PositionWriter(tmp_path / "x.partial", 3)) as target:
        target.write(0, np.ones(3, np.uint8))
        assert (tmp_path / "x").read_bytes() == b"" and (tmp_path / "x.partial").read_bytes() == b"\1\1\1"
        target.move(tmp_path / "y")
        (tmp_path / "x.partial").write_bytes(b"the next one's")
        target.delete()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.partial", "y"]


def test_a_disk_that_takes_a_part_is_an_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(PositionWriter(tmp_path / "file", 900)) as target:
        target.write(0, np.zeros(9, np.uint8))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(ResourceError, match=r"cannot write .*file \(.*\): choose another place with --out"):
                target.write(90, np.ones(20, np.uint8))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_names_that_cannot_be_written_are_refused_at_once(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"some notes")
    for out, why in ((tmp_path / "none" / "x", "no folder"), (tmp_path / ("n" * 230), "")):
        for command in ("compress", "decompress"):
            assert cli([command, str(run), str(tmp_path / "file"), "--out", str(out)]) == 5
            assert f"cannot write {out} ({why}" in capfd.readouterr().err


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"another's")
    (tmp_path / "x.partial").symlink_to(tmp_path / "other")
    with pytest.raises(ResourceError, match=r"cannot write .*x\.partial \("):
        PositionWriter(tmp_path / "x.partial", 3)
    assert (tmp_path / "other").read_bytes() == b"another's"


def test_nothing_is_left_of_a_damaged_file(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"line 7 of some notes\n" * 9)
    assert cli(["compress", str(run), str(tmp_path / "file"), "--quiet"]) == 0
    packed = bytearray((tmp_path / "file.blm").read_bytes())
    packed[HEADER.size - 1] ^= 8  # the checksum of the content
    (tmp_path / "file.blm").write_bytes(packed)
    assert cli(["decompress", str(run), str(tmp_path / "file.blm"), "--out", str(tmp_path / "x"), "--quiet"]) == 3
    assert "file.blm: decompression does not restore the input: it is damaged" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.blm"]


def test_a_memory_that_was_interrupted_is_the_same(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bytelm.cli import online

    words, file = ["prime", str(run), "--memory", "2", "--json"], run / "memory.bin"
    assert cli(words) == 0
    whole, learn = file.read_bytes(), Memory.learn

    def pressed(self: Memory, data: Any, logp: Any = None) -> None:
        learn(self, data, logp)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(online, "PIECE", 7000)
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
