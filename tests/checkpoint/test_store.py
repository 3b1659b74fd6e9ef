"""What a run has saved survives kills and full disks, and what was damaged is named, never loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.lock import exclusive
from bytelm.checkpoint.tensors import DTYPES, widened
from bytelm.errors import CheckpointError, ConfigError, ResourceError

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


def content(step: int) -> dict[str, dict[str, Tensor]]:
    """What step `step` of the test runs holds."""
    moments = {"m": torch.full((3, 5), step / 7), "v": torch.ones(())}
    return {"model": {"a": torch.full((50,), step)}, "optimizer": moments}


def save(run: Path, step: int, keep: int = 2) -> Path:
    return store.save(run, step, content(step), {"bytes": step * 10}, keep)


def holds(path: Path, step: int) -> bool:
    store.verify(path)
    groups = content(step)
    found = {group: store.read_tensors(path, group) for group in groups}
    same = all(torch.equal(found[g][n], groups[g][n]) for g in groups for n in groups[g])
    return same and store.read_state(path) == {"bytes": step * 10, "step": step}


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def seal(path: Path) -> None:
    """Make the manifest fit the files, as one with ill intent would."""
    body = json.loads((path / "MANIFEST.json").read_text())
    del body["sha256"]
    for name in body["files"]:
        data = (path / name).read_bytes()
        body["files"][name] = {"size": len(data), "sha256": store.hashlib.sha256(data).hexdigest()}
    write_manifest(path, body)


def write_manifest(path: Path, body: dict[str, Any]) -> None:
    (path / "MANIFEST.json").write_text(json.dumps({**body, "sha256": store._digest(body)}))  # pyright: ignore[reportPrivateUsage]


# ---- round trip ----

KINDS = st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3))


@settings(max_examples=30)
@given(st.lists(KINDS, max_size=6), st.integers(0, 2**60))
def test_tensors_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, kinds: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for i, (dtype, shape) in enumerate(kinds):
        size = [*shape, dtype.itemsize]
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, size, dtype=torch.uint8, generator=generator)
        tensors[f"w.{i}"] = raw.view(dtype).reshape(shape)  # any bits, NaN among them
    run = tmp_path_factory.mktemp("run")
    found = store.read_tensors(store.save(run, 1, {"model": tensors}, {}), "model")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_shared_strided_and_trained_tensors_come_back_alone(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"tied": base, "tied2": base, "trained": torch.nn.Parameter(base)}
    tensors |= {"turned": base.T, "every2": base[0, ::2], "wide": base[:1].expand(3, 6)}
    found = store.read_tensors(store.save(tmp_path, 0, {"model": tensors}, {}), "model")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    found["tied"].zero_()
    assert torch.equal(found["tied2"], base)


def test_the_library_itself_reads_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    found = safetensors.torch.load_file(str(path / "optimizer.safetensors"))  # pyright: ignore[reportUnknownMemberType]
    assert torch.equal(found["m"], content(3)["optimizer"]["m"])
    path = store.save(tmp_path, 4, {"model": {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2)}}, {})
    found = safetensors.torch.load_file(str(path / "model.safetensors"))  # pyright: ignore[reportUnknownMemberType]
    assert found["b"].data_ptr() % 4 == 0  # where it is mapped, each stands where its type may stand


def test_loaded_tensors_do_not_follow_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    found = store.read_tensors(path, "model")
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff" * 100)
    assert torch.equal(found["a"], content(3)["model"]["a"])


def test_widened_tensors_are_the_same_numbers(tmp_path: Path) -> None:
    """Every value that 16 bits hold, NaN among them; all that is no float of 16 bits stays what it is."""
    bits = torch.arange(-(2**15), 2**15).short()
    tensors = {"half": bits.view(torch.float16), "brain": bits.view(torch.bfloat16), "int": bits}
    tensors |= {"single": torch.rand(3), "double": torch.rand(3).double(), "empty": torch.zeros(2, 0).half()}
    path = store.save(tmp_path, 0, {"model": tensors}, {})
    plain, wide = store.read_tensors(path, "model"), store.read_tensors(path, "model", widened)
    for name, tensor in tensors.items():
        assert plain[name].dtype == tensor.dtype
        assert wide[name].dtype == (torch.float32 if tensor.dtype.itemsize == 2 and name != "int" else tensor.dtype)
        assert torch.equal(wide[name].to(tensor.dtype).nan_to_num(7), tensor.nan_to_num(7))


@pytest.mark.fault("K1")
@pytest.mark.parametrize("change", ["a byte", "cut short", "another"])
def test_a_file_that_changes_after_it_was_checked_is_not_used(tmp_path: Path, change: str) -> None:
    """What is read is checked as it is read, whatever was found before."""
    path, other = save(tmp_path, 3), save(tmp_path, 4)
    store.verify(path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    new = {"a byte": data[:-1] + b"\1", "cut short": data[:-1], "another": (other / file.name).read_bytes()}
    file.write_bytes(new[change])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (damaged|cut short)"):
        store.read_tensors(path, "model", widened)


@pytest.mark.fault("K3")
def test_values_that_are_not_finite_are_counted_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PIECE", 4)
    table = torch.zeros(3, 5)
    table[0, 0], table[1, 3], table[2, 4] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(CheckpointError, match="not finite  a  NaN or Inf in 3 of 15 values"):
        store.check_keys({"a": table}, {"a": table}, "there")
    store.check_keys({"a": table[:0]}, {"a": table[:0]}, "there")


def test_what_cannot_be_saved_leaves_the_disk_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'z': torch\.complex64"):
        store.save(tmp_path, 1, {"model": {"z": torch.zeros(2, dtype=torch.complex64)}}, {})
    with pytest.raises(ValueError, match="JSON"):
        store.save(tmp_path, 1, {}, {"loss": float("nan")})
    with pytest.raises(ConfigError, match="at least 2"):
        save(tmp_path, 1, keep=1)
    assert list(tmp_path.iterdir()) == []


# ---- keeping ----


def test_the_newest_stay_and_dead_writes_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000004.tmp-dead" / "new").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    save(tmp_path, 20)
    assert names(tmp_path) == ["latest", "notes", "step-00000003", "step-00000020"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000020\n"
    assert [p.name for p in store.checkpoints(tmp_path)] == ["step-00000003", "step-00000020"]
    for step in (21, 22):
        save(tmp_path, step, keep=3)
    assert names(tmp_path)[2:] == ["step-00000020", "step-00000021", "step-00000022"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999)
    assert save(tmp_path, 100_000_000) == store.newest(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    store.save(tmp_path, 2, {"model": {"old": torch.zeros(3)}}, {})
    assert holds(save(tmp_path, 2), 2)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.fault("K1")
def test_after_falling_back_the_save_is_not_pruned_and_later_steps_are_left(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        damage_size(save(tmp_path, step, keep=3), "state.json")
    save(tmp_path, 12)
    save(tmp_path, 14)
    path, passed_over = store.newest_good(tmp_path)
    assert holds(path, 14) and len(passed_over) == 2
    assert names(tmp_path) == ["latest"] + [f"step-000000{s}" for s in (12, 14, 20, 30)]


# ---- damage ----


def damage_size(path: Path, name: str) -> None:
    os.truncate(path / name, (path / name).stat().st_size // 2)


def damage_byte(path: Path, name: str) -> None:
    data = bytearray((path / name).read_bytes())
    data[len(data) * 2 // 3] ^= 1
    (path / name).write_bytes(data)


def damage_tail(path: Path, name: str) -> None:
    with (path / name).open("ab") as file:
        file.write(b"1")


def damage_gone(path: Path, name: str) -> None:
    (path / name).unlink()


def damage_swap(path: Path, name: str) -> None:
    """The file of another step, of the same size."""
    shutil.copy(path.parent / "step-00000001" / name, path / name)


def damage_pipe(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)


DAMAGES = [damage_size, damage_byte, damage_tail, damage_gone, damage_swap, damage_pipe]


@pytest.mark.fault("K1")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_file_before_use_and_stepped_over(
    tmp_path: Path, damage: Callable[[Path, str], None], name: str
) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    damage(second, name)
    # A whole manifest of another step fits itself; it is the files that do not fit it.
    blamed = "model.safetensors|state.json" if damage is damage_swap and name == "MANIFEST.json" else name
    with pytest.raises(CheckpointError, match=f"step-00000002/({blamed}) "):
        store.verify(second)
    if name == "state.json":
        with pytest.raises(CheckpointError, match=blamed):
            store.read_state(second)
    else:
        with pytest.raises(CheckpointError, match=blamed):
            store.read_tensors(second, "optimizer" if name.startswith("optimizer") else "model")
    path, passed_over = store.newest_good(tmp_path)
    assert path == first and holds(path, 1)
    if name == "MANIFEST.json" and damage is damage_gone:  # then it is no checkpoint at all
        assert passed_over == [] and store.newest(tmp_path) == first
    else:
        assert len(passed_over) == 1 and "step-00000002/" in passed_over[0] and "\n" not in passed_over[0]
        with pytest.raises(CheckpointError, match=rf"step-00000002/({blamed}).* the latest intact one is {first}"):
            store.newest(tmp_path)


@pytest.mark.fault("K1")
def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in FILES:
        whole = (path / name).read_bytes()
        for at in range(0, len(whole), 7):
            (path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match=name if name != "MANIFEST.json" else str(path)):
                store.verify(path)
        (path / name).write_bytes(whole)
    store.verify(path)


@pytest.mark.fault("K1")
def test_an_extra_file_is_named_and_dot_files_are_not(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / ".DS_Store").write_bytes(b"x")
    store.verify(path)
    (path / "more.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"more\.safetensors is not listed in MANIFEST"):
        store.verify(path)


@pytest.mark.fault("K1")
def test_no_sound_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        store.newest(tmp_path / "absent")
    damage_size(save(tmp_path, 1), "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*model\.safetensors is cut short"):
        store.newest_good(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors: it has model\.safetensors"):
        store.read_tensors(save(tmp_path, 2), "ema")


@pytest.mark.fault("K4")
def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    body = json.loads((path / "MANIFEST.json").read_text()) | {"format": 3}
    (path / "MANIFEST.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="made by a newer bytelm: format 3, this one reads up to 1"):
        store.verify(path)


# ---- ill intent: the manifest fits, the files are made to hurt ----


def head(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


ENTRY = '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[%s]}}'
HOSTILE = {
    "empty": b"",
    "huge length": head("{}", 2**63),
    "long length": head("{}", 90_000_000),
    "garbage": bytes(range(256)) * 4,
    "no JSON": head("{{{{"),
    "list": head("[1,2]"),
    "deep": head("[" * 100_000),
    "shape overflow": head(ENTRY % (f"{2**62},{2**62}", "0,4")) + bytes(4),
    "shape lies": head(ENTRY % ("1000000000", "0,4")) + bytes(4),
    "empty but huge": head(ENTRY % (f"0,{2**62},8", "0,0")),
    "empty but endless": head(ENTRY % (f"0,{2**63}", "0,0")),
    "negative": head(ENTRY % ("-1", "0,4")) + bytes(4),
    "offsets outside": head(ENTRY % ("1", "400,404")) + bytes(4),
    "offsets backwards": head(ENTRY % ("1", "4,0")) + bytes(4),
    "unknown dtype": head(ENTRY.replace("F32", "F77") % ("1", "0,4")) + bytes(4),
    "dtype without torch": head(ENTRY.replace("F32", "F4") % ("8", "0,4")) + bytes(4),
    "overlap": head(ENTRY[:-1] % ("1", "0,4") + "," + ENTRY.replace("a", "b", 1)[1:] % ("1", "2,6")) + bytes(6),
    "trailing": head(ENTRY % ("1", "0,4")) + bytes(40),
    "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
}


@pytest.mark.fault("K6")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tensors_are_an_error_that_names_the_file(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(HOSTILE[kind])
    seal(path)
    store.verify(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file that can be read"):
        store.read_tensors(path, "model")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A checkpoint to be written over, and what its optimizer's file held."""
    path = save(tmp_path_factory.mktemp("victim"), 1)
    return path, (path / "optimizer.safetensors").read_bytes()


@pytest.mark.fault("K6")
@settings(max_examples=100)
@given(data=st.data())
def test_any_change_to_a_header_gives_tensors_or_an_error(victim: tuple[Path, bytes], data: st.DataObject) -> None:
    path, raw = victim[0], bytearray(victim[1])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        cut = data.draw(st.integers(0, 3))
        raw[at : at + cut] = data.draw(st.sampled_from([b"[", b'"', b"9" * 20, b"\xff", b"-", b""]))
    (path / "optimizer.safetensors").write_bytes(raw)
    seal(path)
    try:
        assert all(torch.is_tensor(t) for t in store.read_tensors(path, "optimizer").values())
    except CheckpointError as error:
        assert "optimizer.safetensors" in str(error)


HOSTILE_MANIFESTS: list[Any] = [
    {},
    {"files": None},
    {"files": [1]},
    {"files": {"a": 1}},
    {"files": {"a": {"size": None, "sha256": ""}}},
    {"files": {"../../secret": {"size": 6, "sha256": store.hashlib.sha256(b"secret").hexdigest()}}},
    {"files": {"..": {"size": 0, "sha256": ""}}},
]


@pytest.mark.fault("K7")
@pytest.mark.parametrize("body", HOSTILE_MANIFESTS)
def test_hostile_manifests(tmp_path: Path, body: dict[str, Any]) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "secret").write_bytes(b"secret")
    write_manifest(path, body)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        store.verify(path)


@pytest.mark.fault("K7")
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"files": ' + "9" * 5000 + "}", "\udcff"])
@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
def test_hostile_json(tmp_path: Path, name: str, text: str) -> None:
    path = save(tmp_path, 1)
    (path / name).write_bytes(text.encode(errors="surrogateescape"))
    if name == "state.json":
        seal(path)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        store.read_state(path)


# ---- kills ----

# One process pays for importing torch; each trial is a fork of it that is killed. `content` is that above.
CRASHES = r"""
import os, random, signal, sys, time
from pathlib import Path
import torch
from bytelm.checkpoint import store
kind, size, run = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def content(step):
    return {"model": {"a": torch.full((size,), step)}, "optimizer": {"m": torch.full((2 * size,), step / 7)}}

def check(steps):
    for path in store.checkpoints(run):
        store.verify(path)
    path = store.newest(run)
    step = store.read_state(path)["step"]
    assert step in steps, (step, steps)
    for group, tensors in content(step).items():
        found = store.read_tensors(path, group)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    return step

def forked(work, wait):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(3)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

def any_instant():
    "Killed at random times of a loop of saves; a pipe tells which save had returned."
    random.seed(1)
    last = 0
    store.save(run, 0, content(0), {})
    torn = 0
    for _ in range(15):
        reader, writer = os.pipe()
        def work():
            for step in range(last + 1, last + 10_000):
                store.save(run, step, content(step), {})
                os.write(writer, step.to_bytes(8, "little"))
        assert forked(work, random.uniform(0, 0.1)) == signal.SIGKILL
        os.close(writer)
        told = os.fdopen(reader, "rb").read()
        done = int.from_bytes(told[-8:], "little") if told else last
        torn += len(list((run / "checkpoints").glob("*.tmp-*")))
        last = check({done, done + 1})
    assert torn, "no kill fell into a save"
    store.save(run, last + 1, content(last + 1), {})
    assert not list((run / "checkpoints").glob("*.tmp-*"))

def every_call():
    "Killed before the n-th thing it asks of the file system, for every n."
    os.fsync = lambda descriptor: None  # a kill is no power cut
    killed_before_every_call([5])  # the only checkpoint is replaced
    killed_before_every_call([3, 4])  # another is added, the oldest goes

def killed_before_every_call(there):
    def work():
        left = limit
        def hook(event, args):
            nonlocal left
            if event.startswith(("os.", "open", "shutil.")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        store.save(run, 5, content(5), {"try": 2})
    for limit in range(1, 1000):
        for path in run.iterdir():
            store.shutil.rmtree(path)
        for step in there:
            store.save(run, step, content(step), {"try": 1})
        status = forked(work, None)
        check({there[-1], 5})
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        store.save(run, 6, content(6), {})
        check({6})
        assert not list((run / "checkpoints").glob("*.tmp-*"))
    assert limit > 20, limit

{"any instant": any_instant, "every call": every_call}[kind]()
"""


@pytest.mark.fault("T4")
@pytest.mark.parametrize(("kind", "size"), [("any instant", 100_000), ("every call", 100)])
def test_a_killed_save_harms_nothing(tmp_path: Path, kind: str, size: int) -> None:
    command = [sys.executable, "-c", CRASHES, kind, str(size), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault("T5")
def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int | str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def spy_fsync(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def spy(move: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def spied(source: Any, target: Any) -> None:
            events.append(("move", Path(target).name))
            move(source, target)

        return spied

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy(rename))
    monkeypatch.setattr(os, "replace", spy(replace))
    path = save(tmp_path, 1)
    moved, pointed = events.index(("move", path.name)), events.index(("move", "latest"))
    before, between, after = events[:moved], events[moved:pointed], events[pointed:]
    assert {("sync", p.stat().st_ino) for p in [path, *path.iterdir(), tmp_path, path.parent / "latest"]} <= set(before)
    order = [e for e in before if e in {("sync", p.stat().st_ino) for p in [path, *path.iterdir()]}]
    assert order[-2:] == [("sync", (path / "MANIFEST.json").stat().st_ino), ("sync", path.stat().st_ino)]
    assert ("sync", path.parent.stat().st_ino) in between and ("sync", path.parent.stat().st_ino) in after


# ---- refusing disks ----


@pytest.mark.fault("T9")
@pytest.mark.parametrize("refused", range(6))
def test_an_error_of_the_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    save(tmp_path, 1)
    left = refused
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"step-00000002: No space left on device; it needs \d+ B") as caught:
        save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert holds(store.newest(tmp_path), 1)


@pytest.mark.fault("T9")
def test_a_full_disk(small_disk: Path) -> None:
    save(small_disk, 1)
    with pytest.raises(ResourceError, match=r"step-00000002: No space left on device; it needs 2\.\d+ MB"):
        store.save(small_disk, 2, {"model": {"a": torch.ones(30_000), "b": torch.ones(500_000)}}, {})
    assert names(small_disk) == ["latest", "step-00000001"]
    assert holds(store.newest(small_disk), 1)
    assert holds(save(small_disk, 2), 2)


@pytest.mark.fault("T10")
def test_a_run_that_vanished_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No such file"):
        save(tmp_path / "gone", 1)
    with pytest.raises(ResourceError, match="No such file"), exclusive(tmp_path / "gone"):
        pass
    assert list(tmp_path.iterdir()) == []


# ---- keys ----


@pytest.mark.fault("K2", "K3")
def test_keys_that_differ_are_a_table(tmp_path: Path) -> None:
    expected = {name: torch.zeros(2) for name in "acdf"} | {"b": torch.zeros(2, 3)}
    store.check_keys(expected, expected, tmp_path)
    found = {"b": torch.zeros(3, 2), "c": torch.zeros(2).bfloat16(), "e": torch.ones(())}
    found |= {"d": torch.tensor([1, torch.inf]), "f": torch.tensor([torch.nan, -torch.inf])}
    with pytest.raises(CheckpointError) as caught:
        store.check_keys(expected, found, "there")
    assert str(caught.value) == textwrap.dedent("""\
        there does not hold the weights of this model:
          missing     a  float32 [2]
          shape       b  float32 [3, 2], not float32 [2, 3]
          dtype       c  bfloat16 [2], not float32 [2]
          not finite  d  NaN or Inf in 1 of 2 values
          unexpected  e  float32 []
          not finite  f  NaN or Inf in 2 of 2 values""")


@pytest.mark.fault("K2")
@pytest.mark.parametrize(("count", "last"), [(20, "k19"), (21, "… and 2 more"), (500, "… and 481 more")])
def test_a_table_has_at_most_20_rows(count: int, last: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        store.check_keys({f"k{i:02d}": torch.zeros(1) for i in range(count)}, {}, "there")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and last in lines[-1]


# ---- the lock ----

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
