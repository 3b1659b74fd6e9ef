"""What a run has saved comes back bit for bit, and what was damaged is named, never loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
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

from bytelm.checkpoint import store, tensors
from bytelm.checkpoint.tensors import DTYPES, Streamed, widened
from bytelm.errors import CheckpointError, ConfigError
from checkpoints import FILES, content, holds, names, save, seal

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


@pytest.mark.parametrize("links", [True, False])
def test_a_run_that_is_over_keeps_its_last_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def none(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "this disk knows no links")

    if not links:
        monkeypatch.setattr(os, "link", none)
    save(tmp_path, 1), save(tmp_path, 2)
    store.keep_weights(tmp_path)
    (path,) = store.checkpoints(tmp_path)
    store.verify(path)
    assert names(tmp_path) == ["latest", "step-00000002"] and not store.resumable(path)
    assert torch.equal(store.read_tensors(path, "model")["a"], content(2)["model"]["a"])
    assert store.read_state(path) == {"bytes": 20, "step": 2}
    with pytest.raises(CheckpointError, match=r"has no optimizer\.safetensors"):
        store.read_tensors(path, "optimizer")
    store.keep_weights(tmp_path)  # again: nothing changes
    assert store.newest(tmp_path) == path and store.resumable(save(tmp_path, 3))


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


# ---- piece by piece ----


def test_a_streamed_tensor_makes_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do pieces of any size of an ordinary one."""
    whole = {"a": torch.rand(7, 3).bfloat16(), "b": torch.rand(2), "c": torch.rand(()), "empty": torch.zeros(0, 4)}
    path = store.save(tmp_path, 1, {"model": whole}, {})
    data, entry = (path / "model.safetensors").read_bytes(), store.entry_of(path, "model.safetensors")
    monkeypatch.setattr(tensors, "PIECE", 9)
    by_rows = {n: Streamed(t.to("meta"), lambda t=t: t.split(2) if t.ndim else (t,)) for n, t in whole.items()}
    for step, found in ((2, whole), (3, by_rows)):
        path = store.save(tmp_path, step, {"model": found}, {})
        assert (path / "model.safetensors").read_bytes() == data
        assert store.entry_of(path, "model.safetensors") == entry


def test_a_streamed_tensor_that_is_not_what_it_said_is_not_saved(tmp_path: Path) -> None:
    short = Streamed(torch.empty(4, 2, device="meta"), lambda: (torch.zeros(3, 2),))
    with pytest.raises(ValueError, match="'a' is 24 bytes long, not 32"):
        store.save(tmp_path, 1, {"model": {"a": short}}, {})
    assert names(tmp_path) == []


def test_the_manifest_has_the_checksum_of_each_tensor(tmp_path: Path) -> None:
    held = {"a": torch.rand(7, 3).bfloat16(), "b": torch.rand(()), "empty": torch.zeros(0, 4)}
    path = store.save(tmp_path, 1, {"model": held}, {})
    found = store.entry_of(path, "model.safetensors")
    wanted = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in held.items()}
    assert found.tensors == {name: hashlib.sha256(data).hexdigest() for name, data in wanted.items()}
    assert found.sha256 == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert store.entry_of(path, "state.json").tensors == {}


def test_checkpoints_without_checksums_of_tensors_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    seal(path)  # which writes the manifest of older versions
    assert holds(path, 1) and store.entry_of(path, "model.safetensors").tensors == {}


@pytest.mark.fault("K1")
def test_sizes_are_checked_where_weights_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    damage_byte(path, "model.safetensors")
    assert store.newest(tmp_path, closely=False) == path
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        store.newest(tmp_path)
    for damage in (damage_size, damage_tail, damage_gone):
        for name in ("model.safetensors", "state.json"):
            damage(save(tmp_path, 2), name)
            with pytest.raises(CheckpointError, match=rf"step-00000002/{name} .*; the latest intact one is {path}"):
                store.newest(tmp_path, closely=False)
    damage_byte(save(tmp_path, 2), "MANIFEST.json")
    with pytest.raises(CheckpointError, match=r"step-00000002/MANIFEST\.json"):
        store.newest(tmp_path, closely=False)


# ---- weights in int8 ----


def test_weights_in_int8_are_restored_by_the_scales_of_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under their own name, to be kept once; whatever else is in int8 stays what it is."""
    weight, scale = torch.randint(-127, 128, (5, 3), dtype=torch.int8), torch.rand(5)
    held = {"x.weight": weight, "x.scale": scale, "y.weight": weight, "z": weight, "z.scale": scale}
    held |= {"u.weight": weight, "u.scale": scale[:4], "v.scale": scale, "w.weight": scale, "w.scale": scale}
    path = store.save(tmp_path, 1, {"model": held}, {})
    monkeypatch.setattr(tensors, "PIECE", 8)
    asked: list[str] = []

    def keep(name: str, tensor: Tensor) -> Tensor:
        asked.append(name)
        return tensor

    found = store.read_tensors(path, "model", keep)
    assert sorted(asked) == sorted(found) == sorted(held.keys() - {"x.scale"})
    assert found["x.weight"].dtype == torch.float32 and torch.equal(found["x.weight"], weight * scale[:, None])
    assert all(torch.equal(found[name], held[name]) for name in found if name != "x.weight")
    assert found["y.weight"].dtype == torch.int8


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
    assert len(passed_over) == 1 and "step-00000002/" in passed_over[0] and "\n" not in passed_over[0]
    with pytest.raises(CheckpointError, match=rf"step-00000002/({blamed}).* the latest intact one is {first}"):
        store.newest(tmp_path)
    (second.parent / f"{second.name}.tmp-dead").mkdir()  # one that is being written is not looked at
    assert store.newest_good(tmp_path) == (path, passed_over)


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
    body = json.loads((path / "MANIFEST.json").read_text()) | {"format": 4}
    (path / "MANIFEST.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="made by a newer bytelm: format 4, this one reads up to 3"):
        store.verify(path)


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
