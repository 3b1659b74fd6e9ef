"""Weights of a published folder that differ, are in pieces, or are pickles; nothing in them is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.errors import CheckpointError
from bytelm.exchange import files
from bytelm.exchange.convert import convert
from bytelm.models.blt.formats import hf
from exchanging import refused, spoil
from published import Pair

EMBEDDING = "model.local_encoder.embed_tokens.weight"
UP = "model.local_decoder.layers.1.mlp.up_proj.weight"


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K2")
def test_weights_that_differ_are_a_table(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["model.extra.weight"] = torch.zeros(2)
        weights["model.patcher.extra.weight"] = torch.zeros(2)  # this model asks its entropy model
        weights["encoder.embed.byte.weight"] = torch.zeros(260, 16)  # our own names are none of theirs
        del weights[EMBEDDING]
        weights["lm_head.weight"] = torch.zeros(16, 260)
        weights["model.local_decoder.norm.weight"] = torch.zeros(16, dtype=torch.int8)

    spoil(folder, change)
    told = refused(folder, error=CheckpointError, table=True)
    for row in (
        "unexpected  model.extra.weight",
        "unexpected  model.patcher.extra.weight",
        "unexpected  encoder.embed.byte.weight",
        f"missing     {EMBEDDING}  float32 [260, 16]",
        "shape       lm_head.weight  float32 [16, 260], not float32 [260, 16]",
        "dtype       model.local_decoder.norm.weight  int8 [16], not float32 [16]",
    ):
        assert row in told
    assert str(folder) in told and len(told.splitlines()) == 7


@pytest.mark.fault("K3")
@pytest.mark.parametrize("name", [EMBEDDING, UP])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_values_that_are_not_finite(folder: Path, name: str, value: float) -> None:
    spoil(folder, lambda weights: weights[name][3, 2:4].fill_(value))
    told = refused(folder, error=CheckpointError, table=True)
    assert f"not finite  {name}  NaN or Inf in 2 of" in told


@pytest.mark.fault("K3")
def test_a_float64_that_no_float32_holds(folder: Path) -> None:
    spoil(folder, lambda weights: weights.update({EMBEDDING: torch.full((260, 16), 1e300, dtype=torch.float64)}))
    assert f"not finite  {EMBEDDING}" in refused(folder, error=CheckpointError, table=True)


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**more: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **more}}).encode()


HEADERS = {
    "empty": b"",
    "short": b"\1\0\0",
    "longer than the file": header(b"{}", length=1 << 40),
    "no JSON": header(b"{nonsense"),
    "no table": header(b"[1, 2, 3]"),
    "nested": header(b"[" * 100_000),
    "past the end": header(entry(data_offsets=[0, 1 << 62]), bytes(8)),
    "backwards": header(entry(data_offsets=[8, 0]), bytes(8)),
    "negative": header(entry(shape=[-2]), bytes(8)),
    "shape beyond 64 bits": header(entry(shape=[1 << 63, 1 << 63]), bytes(8)),
    "shape that overflows to 2": header(entry(shape=[(1 << 62) + 1, 4]), bytes(8)),
    "too little for its shape": header(entry(), bytes(4)),
    "left over": header(entry(), bytes(80)),
    "unknown dtype": header(entry(dtype="F99"), bytes(8)),
    "dtype that we have not": header(entry(dtype="F8_E4M3"), bytes(8)),
    "no UTF-8": header(b'{"\xff": 1}'),
    "an HTML page": b"<!DOCTYPE html><html>not found</html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.fault("K6")
@pytest.mark.parametrize("name", HEADERS)
def test_hostile_safetensors(folder: Path, name: str) -> None:
    (folder / hf.WEIGHTS).write_bytes(HEADERS[name])
    assert hf.WEIGHTS in refused(folder, error=CheckpointError, table=True)


@pytest.mark.fault("K6")
@settings(max_examples=60)
@given(st.data())
def test_any_damage_to_a_header_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2, 2).half()}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with files.ExitStack() as stack:
        try:
            for weight in files.weights_in(path, stack).values():
                assert weight.read().shape == weight.like.shape
        except CheckpointError:
            pass


# ---- in pieces -------------------------------------------------------------------------------------------------------


def in_pieces(folder: Path, change: Callable[[dict[str, str]], Any] = lambda where: None) -> Path:
    """Make two files and an index of a folder's weights."""
    weights = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    halves = [sorted(weights)[::2], sorted(weights)[1::2]]
    where: dict[str, str] = {}
    for i, half in enumerate(halves):
        save_file({name: weights[name] for name in half}, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(half, f"model-{i}.safetensors")
    changed = change(where)
    index = {"weight_map": where if changed is None else changed}
    (folder / f"{hf.WEIGHTS}{files.INDEX}").write_text(json.dumps(index))
    return folder


def test_an_index_is_followed(folder: Path, one: Pair) -> None:
    convert(in_pieces(folder), "hf", folder.parent / "run", {})
    found, wanted = (store.read_tensors(store.newest(run), "model") for run in (folder.parent / "run", one.run))
    assert all(torch.equal(found[name], wanted[name]) for name in found | wanted)


OUTSIDE = ("../hf/model-1.safetensors", "/model-1.safetensors", "a/../model-1.safetensors", "..", "", ".")


@pytest.mark.fault("K7")
@pytest.mark.parametrize("file", [*OUTSIDE, "model-1.bin", "config.json", f"{hf.WEIGHTS}{files.INDEX}"])
def test_an_index_names_safetensors_beside_it_alone(folder: Path, file: str) -> None:
    in_pieces(folder, lambda where: where.update({EMBEDDING: file}))
    assert f"names {file!r}" in refused(folder, error=CheckpointError)


def test_an_index_that_names_what_is_not_there(folder: Path) -> None:
    in_pieces(folder, lambda where: where.update({EMBEDDING: "model-9.safetensors"}))
    assert "model-9.safetensors is missing" in refused(folder, error=CheckpointError)


@pytest.mark.parametrize("file", ["x" * 300, "a\0", "\ud800"])
def test_an_index_that_names_what_no_disk_can_hold(folder: Path, file: str) -> None:
    in_pieces(folder, lambda where: where.update({EMBEDDING: f"{file}.safetensors"}))
    assert ".safetensors" in refused(folder, error=CheckpointError)


def test_an_index_that_names_a_tensor_too_many(folder: Path) -> None:
    in_pieces(folder, lambda where: where.update({"a": "model-0.safetensors", "b": "model-1.safetensors"}))
    assert "names 'a' and 1 more, which its files do not contain" in refused(folder, error=CheckpointError)


@pytest.mark.fault("K7")
@pytest.mark.parametrize("index", [None, [], {"weight_map": 3}, {"weight_map": {"a": 3}}, {"weight_map": None}])
def test_what_is_no_index(folder: Path, index: Any) -> None:
    in_pieces(folder)
    (folder / f"{hf.WEIGHTS}{files.INDEX}").write_text(json.dumps(index))
    assert files.INDEX in refused(folder, error=CheckpointError)


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Command:
    """A pickle that, were it trusted, would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.fault("K5")
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_executed(theirs: Path, zipped: bool) -> None:
    marker, file = theirs.parent / "marker", theirs / "entropy_model" / "consolidated.pth"
    content = {"model": torch.load(file)["model"], "more": Command(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert "nothing in it was executed" in refused(theirs, "meta", CheckpointError)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # it would have


@pytest.mark.fault("K5")
@pytest.mark.parametrize("content", [b"", b"PK", b"PK\3\4 and no more", b"\x80\2garbage", b"no pickle at all\n" * 99])
def test_what_is_no_pickle(theirs: Path, content: bytes) -> None:
    (theirs / "entropy_model" / "consolidated.pth").write_bytes(content)
    assert "consolidated.pth cannot be read" in refused(theirs, "meta", CheckpointError)


@pytest.mark.fault("K5")
@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [torch.zeros(3)],
        {"model": {"a": torch.zeros(3), "b": 3}},
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
    ],
    ids=["a tensor", "a list", "a number", "sparse", "without values"],
)
def test_a_pickle_that_holds_no_table_of_tensors(theirs: Path, content: Any) -> None:
    torch.save(content, theirs / "entropy_model" / "consolidated.pth")
    assert "holds no table of tensors" in refused(theirs, "meta", CheckpointError)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32, torch.float8_e4m3fn, torch.uint16], ids=str)
def test_tables_that_mean_nothing_may_be_of_any_dtype(
    one: Pair, folder: Path, theirs: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Meta's tables of angles are complex, in either kind of file; a weight that counts is named."""
    spoil(folder, lambda weights: weights.update({"model.rotary_emb.inv_freq": torch.zeros(8).to(dtype)}))
    spoil(theirs, lambda weights: weights.update({"rope_embeddings.freqs_cis": torch.zeros(8, 4).to(dtype)}))
    file = theirs / "entropy_model" / "consolidated.pth"
    weights = torch.load(file)["model"]
    torch.save({"model": {**weights, "rope_embeddings.freqs_cis": torch.zeros(8).to(dtype)}}, file)
    wanted = store.read_tensors(store.newest(one.run), "model")
    for source, layout in ((folder, "hf"), (theirs, "meta")):
        run = tmp_path / f"run of {layout}"
        convert(source, layout, run, {})
        found = store.read_tensors(store.newest(run), "model")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    if dtype != torch.float32:
        spoil(folder, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"].to(dtype)}))
        told = refused(folder, error=CheckpointError, table=True)
        assert f"dtype       lm_head.weight  {str(dtype).removeprefix('torch.')} [260, 16], not float32" in told


def test_dtypes_that_models_do_not_compute_in(theirs: Path) -> None:
    file = theirs / "entropy_model" / "consolidated.pth"
    weights = torch.load(file)["model"]
    weights["norm.weight"] = weights["norm.weight"].to(torch.float8_e4m3fn)
    weights["output.weight"] = weights["output.weight"].to(torch.complex64)
    torch.save(weights, file)
    told = refused(theirs, "meta", CheckpointError, table=True)
    assert "dtype       entropy_model.norm.weight  float8_e4m3fn" in told
    assert "dtype       entropy_model.output.weight  complex64" in told


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_pickles_of_older_torch_and_by_themselves(theirs: Path, hub: Path, one: Pair, key: str | None) -> None:
    file = theirs / "entropy_model" / "consolidated.pth"
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in torch.load(file)["model"].items()}
    torch.save(weights if key is None else {key: weights}, file, _use_new_zipfile_serialization=False)
    assert file.read_bytes()[:2] != b"PK"
    convert(theirs, "meta", theirs.parent / "run", {})
    found, wanted = (store.read_tensors(store.newest(run), "model") for run in (theirs.parent / "run", one.run))
    assert all(torch.equal(found[name], wanted[name]) for name in found | wanted)
