"""Checkpoints made to hurt: their manifest fits, and they are refused in a line, in bounded memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.checkpoint import store
from bytelm.errors import CheckpointError
from checkpoints import save, seal, write_manifest


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
    {"files": {"../../secret": {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}},
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
