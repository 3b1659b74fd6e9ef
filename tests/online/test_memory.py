"""What a memory promises: probabilities that sum to 1, no difference by pieces, going back, files."""

from __future__ import annotations

import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bytelm.errors import CheckpointError, ConfigError, ResourceError, UsageError
from bytelm.native import logits
from bytelm.native import online as bindings
from bytelm.online import engine
from bytelm.online.layout import CHANGING
from bytelm.online.memory import TRAILER, Memory, among_bytes
from bytelm.online.settings import Settings
from online_inputs import inputs, logs

SMALL = Settings(memory=1 << 20)


def read(*parts: bytes, beside: bool = False) -> Memory:
    memory = Memory(SMALL)
    for part in parts:
        memory.nats(part, logs(len(part)) if beside else None)
    return memory


def resident() -> int:
    """Bytes of main memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def same(a: Memory, b: Memory) -> bool:
    return bool((a._arena == b._arena).all())


@pytest.mark.parametrize("kind", inputs())
def test_256_continuations_sum_to_1_and_their_costs_are_those_of_reading(kind: str) -> None:
    memory, data = Memory(SMALL), inputs()[kind]
    logp = logs(len(data))
    for i in range(0, 100, 9):
        for row in (None, logp[i]):
            p = memory.probabilities(row)
            assert p.min() > 0 and abs(p.sum() - 1) < 1e-12
            memory.mark()
            cost = memory.nats(data[i : i + 1], None if row is None else row[None])[0]
            memory.undo()
            assert abs(cost + memory.log_probabilities(row)[data[i]]) < 1e-12
        memory.learn(data[i : i + 9], logp[i : i + 9] if i % 2 else None)


@pytest.mark.parametrize("by", ["kernels", "numpy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_probabilities_of_a_network_are_the_same_alone_and_among_others(
    by: str, dtype: type[np.floating], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "numpy":
        monkeypatch.setattr(logits, "library", lambda name: None)
    lines = (np.random.default_rng(0).normal(size=(40, 260)) * 9).astype(dtype)
    found = among_bytes(lines)
    assert found.dtype == np.float32 and found.shape == (40, 256)
    right = lines[:, :256].astype(np.float64)
    right -= np.log(np.exp(right).sum(1, keepdims=True))
    assert np.abs(found - right).max() < 1e-5
    assert all((among_bytes(line[None]) == own).all() for line, own in zip(lines, found, strict=True))
    assert (among_bytes(lines[:, :256]) == found).all()


def test_reading_in_pieces_is_reading_whole() -> None:
    data = np.concatenate(list(inputs().values()))
    logp = logs(len(data))
    whole, pieces, single = Memory(SMALL), Memory(SMALL), Memory(SMALL)
    costs = whole.nats(data, logp)
    cuts = [0, 1, 1, 17, 400, len(data)]
    found = [pieces.nats(data[a:b], logp[a:b]) for a, b in pairwise(cuts)]
    for byte, row in zip(data.tolist(), logp, strict=True):
        single.update(byte, row)
    assert (np.concatenate(found) == costs).all() and same(whole, pieces) and same(whole, single)
    assert whole.read_bytes == len(data)


def test_a_repeated_text_costs_little_the_second_time() -> None:
    data = inputs()["random"]
    costs = Memory(SMALL).nats(np.concatenate([data, data, data]))
    first, second, third = costs.reshape(3, -1).sum(1)
    assert first > 7.5 * np.log(2) * len(data) and second < first / 3 and third < first / 10


def test_a_good_network_is_believed_and_one_that_comes_later_too() -> None:
    data = np.random.default_rng(5).integers(0, 256, 2000, np.uint8)
    logp = np.full((2000, 256), np.log(0.1 / 255), np.float32)
    logp[np.arange(2000), data] = np.log(0.9)
    cold, primed = Memory(SMALL), read(inputs()["text"].tobytes() * 20)
    for memory in (cold, primed):
        assert memory.nats(data, logp)[1000:].mean() < 0.3


def test_undo_restores_every_byte_and_marks_are_nested() -> None:
    memory = read(inputs()["text"].tobytes())
    data, logp = inputs()["random"], logs(150)
    before = memory.clone()
    memory.mark()
    memory.nats(data, logp)  # the network is met
    middle = memory.clone()
    memory.mark()
    memory.learn(data)
    memory.undo()
    assert same(memory, middle)
    memory.mark()
    memory.learn(data[:9])
    memory.keep()
    memory.undo()
    assert same(memory, before)
    with pytest.raises(UsageError, match="no mark"):
        memory.undo()
    memory.learn(data)
    assert not same(memory, before)


def test_a_clone_goes_its_own_way() -> None:
    memory = read(b"abc" * 30)
    other = memory.clone()
    assert same(memory, other)
    other.learn(b"x")
    assert memory.read_bytes == 90 and other.read_bytes == 91


def test_a_clone_of_a_file_takes_no_room_until_it_writes(tmp_path: Path) -> None:
    """So that requests of a server have a primed memory each, at once; whatever became of the file meanwhile."""
    file = tmp_path / "memory"
    large = Memory(Settings(memory=48 << 20))
    large.learn(b"what it has read before")
    large.save(file)
    loaded = Memory.load(file)
    file.unlink()
    before = resident()
    clones = [loaded.clone() for _ in range(4)]
    assert resident() - before < large.bytes  # less than one of them
    clones[0].learn(b"x")
    assert clones[0].read_bytes == 24 and same(clones[0].clone(), clones[0])
    assert same(clones[1], large) and same(clones[1].clone(), loaded)
    loaded.learn(b"y")
    assert same(loaded.clone(), loaded) and not same(loaded.clone(), large)


def test_saved_and_loaded_it_goes_on_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    file, data = tmp_path / "memory", inputs()["text"]
    memory = read(data.tobytes(), beside=True)
    memory.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    content = file.read_bytes()
    assert len(content) == memory.bytes + TRAILER
    loaded = Memory.load(file, SMALL)
    assert loaded.settings == SMALL and loaded.read_bytes == len(data) and same(memory, loaded)
    assert (loaded.nats(data) == memory.nats(data)).all() and same(memory, loaded)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda c: c[:-1], "bytes in the place of"),
        (lambda c: c + b"x", "bytes in the place of"),
        (lambda c: c[:500], "no memory of bytelm, or cut off"),
        (lambda c: b"", "cannot be read"),
        (lambda c: b"x" + c[1:], "no memory of bytelm"),
        (lambda c: c[:8] + b"\x07" + c[9:], "its version is 7, and this bytelm reads 1"),
        (lambda c: c[:16] + b"\x07" + c[17:], "damaged"),
        (lambda c: c[:CHANGING] + b"\x07" + c[CHANGING + 1 :], "damaged"),
        (lambda c: c[:-TRAILER] + bytes(TRAILER), "damaged"),
        (lambda c: c[:300000] + bytes([c[300000] ^ 1]) + c[300001:], "damaged"),
        (lambda c: c.replace(b"order:0", b"ordre:0"), "unknown predictor 'ordre'"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(harm, says: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "memory"
    read(b"abc").save(file)
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(CheckpointError, match=says) as error:
        Memory.load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_other_settings_and_no_file_are_refused(tmp_path: Path) -> None:
    read(b"abc").save(tmp_path / "memory")
    with pytest.raises(CheckpointError, match="its settings are"):
        Memory.load(tmp_path / "memory", Settings(("order:1",), 1 << 20))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Memory.load(tmp_path / "none")
    with pytest.raises(ResourceError, match="cannot write"):
        read(b"abc").save(tmp_path / "none" / "memory")


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Settings(memory=5), "online.memory = 5: must be from"),
        (lambda: Settings(("order",)), "give order:NUMBER"),
        (lambda: Settings(("word:1",)), "give word without a number"),
        (lambda: Settings(("order:33",)), "must be from 0 to 32"),
        (lambda: Settings(("order:1", "order:1")), "named twice"),
        (lambda: Settings(("match:5",)), "none of them is a context model"),
        (lambda: Settings(tuple(f"order:{n}" for n in range(25))), "at most 24"),
        (lambda: Settings(("oder:1",)), "did you mean 'order'"),
    ],
)
def test_settings_that_cannot_be_are_refused(made, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=says):
        made()


def test_arrays_of_other_shapes_are_refused() -> None:
    memory = Memory(SMALL)
    for data, logp in (
        (np.zeros((2, 2), np.uint8), None),
        (np.zeros(3, np.uint8), logs(2)),
    ):
        with pytest.raises(UsageError, match="memory: "):
            memory.nats(data, logp)
    with pytest.raises(UsageError, match=r"give \[256\]"):
        memory.probabilities(logs(1))


def test_without_a_compiler_the_definition_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if bindings.kernel() is None:
        pytest.skip("no C++ compiler")
    data, logp = inputs()["text"][:60], logs(60)
    fast = Memory(SMALL)
    monkeypatch.setattr(engine, "kernel", lambda: None)
    slow = Memory(SMALL)
    assert isinstance(slow._engine, engine.Python) and isinstance(fast._engine, engine.Kernel)
    assert (fast.nats(data, logp) == slow.nats(data, logp)).all() and same(fast, slow)
    assert (fast.probabilities() == slow.probabilities()).all()
    slow.mark()
    slow.learn(data)
    slow.undo()
    assert same(fast, slow)
