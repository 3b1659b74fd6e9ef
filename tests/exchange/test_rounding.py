"""Runs whose linear layers and n-gram tables are stored in bfloat16 or int8, made of published weights and of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bytelm import load
from bytelm.checkpoint import store, tensors
from bytelm.checkpoint.assemble import Recipe, weights_of
from bytelm.cli import run as cli
from bytelm.config import to_mapping
from bytelm.data.modalities import dna
from bytelm.errors import CheckpointError, UsageError
from bytelm.exchange.convert import convert, export
from bytelm.exchange.rounding import Kind
from bytelm.models.transformer import model as transformer
from bytelm.native.weights import quantised
from exchanging import held, recipe_of, refused, same, spoil
from published import TEXTS, Pair, save

TABLE = "encoder.embed.ngram.weight"
LINEAR = "latent.blocks.0.attention.qkv.weight"
HEAD = "decoder.head.weight"
PATCHER = "patcher.entropy_model.model.head.weight"
EMBEDDING = "encoder.embed.byte.weight"
NORM = "latent.blocks.0.attention_norm.weight"


def stored(run: Path) -> dict[str, Tensor]:
    """The tensors of a run as its file has them."""
    store.verify(store.newest(run))
    return load_file(store.newest(run) / "model.safetensors")


def is_rounded(found: dict[str, Tensor], name: str, wanted: Tensor) -> bool:
    """Whether a weight is there in int8 with its scales, as decoders round it."""
    whole, scale = quantised(wanted)
    return torch.equal(found[name], whole) and torch.equal(found[name[:-6] + "scale"], scale)


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize("tables", [None, "bf16", "int8"])
def test_what_is_asked_for_is_rounded_and_nothing_else(
    one: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Kind | None, tables: Kind | None
) -> None:
    """Not the patcher, whose every bit matters to boundaries, nor embeddings of bytes, nor norms."""
    monkeypatch.setattr(tensors, "PIECE", 100)
    made = convert(one.folder, "hf", tmp_path / "run", {}, weights=weights, tables=tables)
    found, wanted = stored(tmp_path / "run"), stored(one.run)
    kinds = {TABLE: tables, LINEAR: weights, HEAD: weights, PATCHER: None, EMBEDDING: None, NORM: None}
    for name, kind in kinds.items():
        if kind == "int8":
            assert is_rounded(found, name, wanted[name])
        else:
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            assert found[name].dtype == dtype and torch.equal(found[name], wanted[name].to(dtype))
    count = sum(tensor.numel() for tensor in wanted.values())
    assert made.parameters == count
    said = {"weights": weights, "tables": tables}
    origin = store.read_state(store.newest(tmp_path / "run"))["converted"]
    assert origin == {"from": "hf", "name": "hf", **{key: kind for key, kind in said.items() if kind}}


def test_every_linear_layer_is_rounded(one: Pair, tmp_path: Path) -> None:
    convert(one.folder, "hf", tmp_path / "run", {}, weights="int8")
    found = stored(tmp_path / "run")
    plain = {name for name, tensor in found.items() if tensor.ndim == 2 and tensor.dtype != torch.int8}
    assert {name for name in plain if not name.startswith("patcher.")} == {TABLE, EMBEDDING}
    assert {name for name, tensor in found.items() if tensor.dtype == torch.int8} >= {LINEAR, HEAD}


def test_rows_of_zeros_and_of_one_large_value(folder: Path) -> None:
    name = "model.encoder_hash_tok_embedding.weight"

    def change(weights: dict[str, Tensor]) -> None:
        weights[name][:5] = 0
        weights[name][7] = torch.tensor([3e38, *[-1e30] * 15])

    spoil(folder, change)
    convert(folder, "hf", folder.parent / "run", {}, tables="int8")
    found = held(folder.parent / "run")[TABLE]
    assert (found[:5] == 0).all() and found[7, 0] == pytest.approx(3e38) and (found[7, 1:] == 0).all()


def test_a_value_that_bfloat16_does_not_hold(folder: Path) -> None:
    spoil(folder, lambda weights: weights["lm_head.weight"][3, :2].fill_(3.4e38))
    convert(folder, "hf", folder.parent / "fine", {})
    with pytest.raises(CheckpointError, match=f"bfloat16 .*\n.*{HEAD}  NaN or Inf in 2 of 4160"):
        convert(folder, "hf", folder.parent / "run", {}, weights="bf16")
    assert not (folder.parent / "run").exists()


# ---- runs of ours ----------------------------------------------------------------------------------------------------


def rounded(source: Path, run: Path, **kinds: Kind) -> dict[str, Tensor]:
    convert(source, "bytelm", run, {}, **kinds)  # pyright: ignore[reportArgumentType]
    return stored(run)


def test_a_run_a_checkpoint_and_a_saved_folder_are_stored_anew(one: Pair, tmp_path: Path) -> None:
    one.lm.save_pretrained(tmp_path / "saved")
    wanted = stored(one.run)
    for i, source in enumerate((one.run, store.newest(one.run), tmp_path / "saved")):
        assert same(rounded(source, tmp_path / f"same {i}"), wanted)
        assert is_rounded(rounded(source, tmp_path / f"int8 {i}", tables="int8"), TABLE, wanted[TABLE])
        assert recipe_of(tmp_path / f"int8 {i}") == recipe_of(one.run)
        origin = store.read_state(store.newest(tmp_path / f"int8 {i}"))["converted"]
        assert origin == {"from": "bytelm", "name": source.name, "tables": "int8"}


def test_what_is_in_int8_stays_so_or_is_restored(one: Pair, tmp_path: Path) -> None:
    first = rounded(one.run, tmp_path / "int8", tables="int8", weights="int8")
    assert same(rounded(tmp_path / "int8", tmp_path / "again"), first)
    assert same(rounded(tmp_path / "int8", tmp_path / "asked again", tables="int8"), first)
    found = rounded(tmp_path / "int8", tmp_path / "bf16", tables="bf16")
    scale = first[TABLE[:-6] + "scale"]
    assert torch.equal(found[TABLE], (first[TABLE] * scale[:, None]).bfloat16())
    assert TABLE[:-6] + "scale" not in found and torch.equal(found[LINEAR], first[LINEAR])


def test_a_model_without_tables_keeps_its_context_and_its_modality(tmp_path: Path) -> None:
    recipe = Recipe(transformer.Config(layers=1, dim=16, heads=2), modality=dna.Config())
    model = recipe.build()
    model.init_weights(0)
    (tmp_path / "run").mkdir()
    store.save(tmp_path / "run", 7, {"model": model.state_dict()}, {"recipe": to_mapping(recipe), "context": 48})
    with pytest.raises(UsageError, match="--tables int8: this model has no n-gram tables"):
        convert(tmp_path / "run", "bytelm", tmp_path / "int8", {}, tables="int8")
    assert not (tmp_path / "int8").exists()
    convert(tmp_path / "run", "bytelm", tmp_path / "int8", {}, weights="int8")
    assert store.read_state(store.newest(tmp_path / "int8"))["context"] == 48
    assert recipe_of(tmp_path / "int8") == recipe_of(tmp_path / "run") and load(tmp_path / "int8").modality is not None


@pytest.mark.fault("K1", "K2", "K3")
@pytest.mark.parametrize("damage", ["a byte", "cut short", "another recipe", "not finite"])
def test_a_damaged_run_is_refused(one: Pair, tmp_path: Path, damage: str) -> None:
    (tmp_path / "source").mkdir()
    state = store.read_state(store.newest(one.run))
    weights = held(one.run)
    if damage == "another recipe":
        state["recipe"]["model"]["global_layers"] += 1
    if damage == "not finite":
        weights[TABLE][5, 3] = torch.nan
    file = store.save(tmp_path / "source", 1, {"model": weights}, state) / "model.safetensors"
    if damage == "a byte":
        file.write_bytes(file.read_bytes()[:-1] + b"\7")
    if damage == "cut short":
        os.truncate(file, 5000)
    told = {
        "a byte": "model.safetensors is damaged",
        "cut short": "model.safetensors is cut short",
        "another recipe": "missing     latent.blocks.2.attention.out.weight",
        "not finite": f"not finite  {TABLE}  NaN or Inf in 1 of",
    }
    assert told[damage] in refused(tmp_path / "source", "bytelm", CheckpointError, table=True)


def test_what_is_no_run_of_ours(one: Pair, folder: Path, tmp_path: Path) -> None:
    assert "no run at" in refused(tmp_path / "none", "bytelm", CheckpointError)
    assert "is of model_type 'blt'" in refused(folder, "bytelm", CheckpointError)
    with pytest.raises(UsageError, match="--to bytelm: a run is one already"):
        export(one.run, "bytelm", tmp_path / "out", {})


# ---- used ------------------------------------------------------------------------------------------------------------


def test_a_run_in_int8_is_used_as_any_other(one: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "int8")
    words = ["convert", str(one.run), run, "--format", "bytelm", "--tables", "int8", "--weights", "int8"]
    assert cli([*words, "--check"]) == 2
    assert "--check compares equal logits, which rounding changes" in capfd.readouterr().err
    assert cli(words) == 0
    found, wanted = (weights_of(store.newest(Path(path))) for path in (run, one.run))
    assert found.keys() == wanted.keys() and all(tensor.dtype == torch.float32 for tensor in found.values())
    assert 0 < (found[TABLE] - wanted[TABLE]).abs().max() < wanted[TABLE].abs().max() / 200
    texts = tmp_path / "texts"
    texts.write_bytes(b"\n".join(TEXTS) * 40)
    capfd.readouterr()
    bits: list[float] = []
    for path in (run, str(one.run)):
        assert cli(["eval", path, str(texts), "--json"]) == 0
        bits.append(json.loads(capfd.readouterr().out)["bits_per_byte"])
    assert bits[0] != bits[1] and bits[0] == pytest.approx(bits[1], abs=0.02)
    export(Path(run), "hf", tmp_path / "hf", {})
    convert(tmp_path / "hf", "hf", tmp_path / "back", {})
    assert same(held(tmp_path / "back"), found)
    options = ["--steps", "1", "--set", "train.batch=1", "--set", "train.context_length=64"]
    assert cli(["train", str(texts), "--init-from", run, "--run", str(tmp_path / "more"), *options]) == 0
    trained = stored(tmp_path / "more")
    assert trained.keys() == wanted.keys() and trained[TABLE].dtype == torch.float32


def test_bfloat16_files_stay_so(one: Pair, tmp_path: Path) -> None:
    source = save(one.theirs.bfloat16(), tmp_path / "hf")
    one.theirs.float()
    convert(source, "hf", tmp_path / "run", {}, weights="bf16", tables="int8")
    found = stored(tmp_path / "run")
    assert {found[name].dtype for name in (LINEAR, HEAD, EMBEDDING, NORM)} == {torch.bfloat16}
    convert(source, "hf", tmp_path / "plain", {})
    assert is_rounded(found, TABLE, stored(tmp_path / "plain")[TABLE])
