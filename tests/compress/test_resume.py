"""Work that was interrupted, killed or read elsewhere: the same file comes of it, or an error that says why not."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytelm import machine
from bytelm.compress import resume, sides, stream, windows
from bytelm.compress.header import LONGEST, opened, sealed, unsealed
from bytelm.compress.resume import Resume, Stopped
from bytelm.compress.sides import State
from bytelm.compress.stream import compress, decode, decompress, encode
from bytelm.compress.windows import Held, Plain
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
    assert opened(model, whole)[0].streams == streams

    def there(saved: Resume) -> bytes:
        source = Plain(tmp_path / "file", len(DATA))
        return encode(model, source, len(DATA), 64, None, memory_of(memory), streams, saved)

    def back(saved: Resume) -> bytes:
        with closing(PositionWriter(tmp_path / "restored", len(DATA))) as target:
            decode(model, whole, target, None, memory_of(memory), saved)
            target.move(tmp_path / "whole")
        return (tmp_path / "whole").read_bytes()

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


def test_before_a_state_is_saved_what_was_read_is_checked_and_what_was_written_lasts(
    model: ByteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did, save = list[str](), resume.write_whole

    class Noted(Held):
        def check(self) -> None:
            did.append("check")

        def sync(self) -> None:
            did.append("sync")

    def saved(*given: Any) -> None:
        did.append("save")
        save(*given)

    monkeypatch.setattr(resume, "write_whole", saved)
    source, target = Noted(np.frombuffer(DATA, np.uint8)), Noted(np.zeros(len(DATA), np.uint8))
    packed = encode(model, source, len(DATA), 64, None, None, 1, Resume(tmp_path / "there", every=0))
    assert did == ["check", "save"] * 15 + ["check"]
    did.clear()
    decode(model, packed, target, None, None, Resume(tmp_path / "back", every=0))
    assert did == ["sync", "save"] * 15 and target.data.tobytes() == DATA


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
    exactly = getattr(sides, name)

    def otherwise(logits: np.ndarray) -> np.ndarray:
        nonlocal seen
        seen, found = seen + 1, exactly(logits)
        if seen == 70:
            found[0, 255] += 1 if memory is None else 1e-6
        return found

    def count(more: int) -> None:
        nonlocal done
        done += more

    monkeypatch.setattr(sides, name, otherwise)
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
    damaged = sealed(replace(header, context=LONGEST - 1).pack() + unsealed(packed)[len(header.pack()) :])

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


def test_a_memory_is_held_once_while_its_state_is_saved_and_after_it_was_read(
    model: ByteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have up to a gigabyte each."""
    memory, written, read = Memory(SMALL), list[Any](), list[weakref.ref[Any]]()
    save, begin = resume.write_whole, Resume.begin

    def noted(path: Path, *parts: Any) -> None:
        written.extend(parts)
        save(path, *parts)

    def begun(self: Resume, key: str) -> tuple[int, State] | None:
        found = begin(self, key)
        read.extend(weakref.ref(array) for array in (found[1].arrays.values() if found else ()))
        return found

    def passed(more: int) -> None:
        assert all(array() is None for array in read)

    monkeypatch.setattr(resume, "write_whole", noted)
    monkeypatch.setattr(Resume, "begin", begun)
    source, path = Held(np.frombuffer(DATA, np.uint8)), tmp_path / "state"
    with pytest.raises(Stopped):
        encode(model, source, len(DATA), 64, None, memory, 1, Resume(path, lambda: True))
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), memory.state) for part in written)
    assert encode(model, source, len(DATA), 64, passed, Memory(SMALL), 1, Resume(path)) and read


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
        coded = unsealed(packed)[len(header.pack()) :]
        decompress(model, sealed(replace(header, settings=claimed.settings).pack() + coded), memory=claimed)
    assert resident() - before < 1 << 29 < claimed.bytes
    room = machine.Memory(1 << 40, claimed.bytes - 1)
    with pytest.raises(ResourceError, match=r"no room for 7.01 GB of online memory, 7.01 GB are free: free some, or"):
        Memory(claimed.settings)
    small = Memory(SMALL)
    room = machine.Memory(1 << 40, 2 * small.bytes - 1)
    with pytest.raises(ResourceError, match=r"no room for .* of online memory"):
        decompress(model, packed, memory=small)
    assert decompress(model, compress(model, DATA, 64, memory=Memory(SMALL)), memory=small) == DATA
