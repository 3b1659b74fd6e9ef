"""Models loaded for inference: packed linear layers, tables of which rows are read, one tensor in memory at a time."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bytelm
from bytelm.checkpoint import manifest, packed, store
from bytelm.checkpoint.assemble import Recipe, load_patches
from bytelm.config import to_mapping
from bytelm.data.files import PositionReader
from bytelm.decoding import open_decoder, rounded
from bytelm.errors import CheckpointError, ResourceError, UsageError
from bytelm.evaluate.patches import patch_view
from bytelm.exchange.convert import convert
from bytelm.interfaces.model import ByteModel
from bytelm.lm import LM
from bytelm.machine import Memory
from bytelm.models.blt.model import Config as BLT
from bytelm.models.hnet.model import Config as HNet
from bytelm.models.megabyte.model import Config as Megabyte
from bytelm.models.ngram.entropy_model import Config as Ngram
from bytelm.models.transformer.entropy_decoder import TransformerEntropies
from bytelm.models.transformer.entropy_model import Config as EntropyModel
from bytelm.models.transformer.model import Config as Transformer
from bytelm.native import library
from bytelm.nn.tables import RowsInFile
from bytelm.patching import entropy
from bytelm.units import BOS

pytestmark = pytest.mark.skipif(library.library("kernels") is None, reason="there are no kernels")

TEXT = "Grüße: the quick brown fox, the quick brown dog.\n".encode() * 3
PATCHING = entropy.Config(threshold=5.5, max_length=6)
SMALL = replace(BLT.tiny()["last layer crossed"], ffn_dims=(24, 40, 56))
WIDE = BLT.tiny()["all layers crossed, widened"]
RECIPES = {
    "blt": Recipe(SMALL, PATCHING, EntropyModel(1, 32, 2, 8)),
    "blt, widened": Recipe(WIDE, PATCHING, EntropyModel(1, 32, 2, 8)),
    "blt on n-grams": Recipe(
        replace(SMALL, ngram_output=True), replace(PATCHING, threshold=1.0), Ngram(order=2, rows=256)
    ),
    "tokens": Recipe(replace(Transformer.tiny()["windowed"], vocabulary=270)),
    "transformer": Recipe(Transformer.tiny()["windowed"]),
    "megabyte": Recipe(next(iter(Megabyte.tiny().values()))),
    "megabyte across patches": Recipe(Megabyte.tiny()["across patches, n-grams"]),
    "hnet": Recipe(HNet.tiny()["two stages, n-grams"]),
}


def weights_of(recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights, those of the entropy model such that patches differ in length."""
    model = recipe.build()
    model.init_weights(0)
    if isinstance(recipe.entropy_model, EntropyModel):
        model.patcher.entropy_model.model.init_weights(1)  # pyright: ignore
        torch.nn.init.normal_(model.patcher.entropy_model.model.head.weight, 0, 0.2)  # pyright: ignore
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}


def saved(run: Path, name: str = "blt", dtype: torch.dtype = torch.float32) -> Path:
    """A run of a random model."""
    return kept(run, name, weights_of(RECIPES[name], dtype))


def kept(run: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    """A run of these weights."""
    run.mkdir(parents=True)
    store.save(run, 0, {"model": tensors}, {"recipe": to_mapping(RECIPES[name]), "context": 64})
    return run


def logits(model: ByteModel, **options: Any) -> np.ndarray:
    """What a decoder says of a text, read in pieces."""
    decoder = open_decoder(model, rows=1, capacity=len(TEXT) + 1, **options)
    ids, found = np.array([BOS, *TEXT]), list[np.ndarray]()
    for part in np.split(ids, [40, 41, 42, 90]):
        found.append(decoder.read(np.zeros_like(part), part))
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_packed_model_computes_what_a_quantized_decoder_does(
    tmp_path: Path, name: str, weights: Any, dtype: torch.dtype
) -> None:
    run = saved(tmp_path / "run", name, dtype)
    whole, small = bytelm.load(run).model, bytelm.load(run, weights=weights).model
    assert small.quantization == weights
    np.testing.assert_array_equal(logits(small), logits(whole, quantize=weights))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_without_rounding_it_computes_what_the_whole_model_does(tmp_path: Path, name: str) -> None:
    run = saved(tmp_path / "run", name)
    small = bytelm.load(run, tables="mapped").model
    assert small.quantization is None
    np.testing.assert_array_equal(logits(small), logits(bytelm.load(run).model))


@pytest.mark.parametrize("name", RECIPES)
def test_the_forward_pass_of_a_packed_model(tmp_path: Path, name: str) -> None:
    """That of a model whose weights were rounded and restored, up to the order of sums."""
    run = saved(tmp_path / "run", name)
    ids = torch.tensor([[BOS, *TEXT]])
    with torch.no_grad():
        wanted = rounded(bytelm.load(run).model, "int8")(ids)[0]
        found = bytelm.load(run, weights="int8", tables="mapped").model(ids)[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["blt", "blt, widened"])
def test_rows_of_tables_are_the_same_from_memory_and_from_the_file(tmp_path: Path, name: str) -> None:
    run = saved(tmp_path / "run", name, torch.bfloat16)
    whole = bytelm.load(run).model
    near, far = (bytelm.load(run, weights="bf16", tables=where).model for where in ("memory", "mapped"))
    np.testing.assert_array_equal(logits(near), logits(whole, quantize="bf16"))
    np.testing.assert_array_equal(logits(far), logits(near))


def test_rows_are_asked_for_before_the_entropy_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the disk has them when the encoder reads them; in chunks and byte by byte."""
    done: list[Any] = []
    prefetch, rows, entropies = RowsInFile.prefetch, RowsInFile.rows, TransformerEntropies.entropies

    def asked(self: RowsInFile, index: np.ndarray) -> None:
        done.append(("asked", index.ravel().tolist()))
        prefetch(self, index)

    def read(self: RowsInFile, index: np.ndarray) -> Any:
        done.append(("read", index.tolist()))
        return rows(self, index)

    def decided(self: TransformerEntropies, *given: Any) -> Any:
        done.append("decided")
        return entropies(self, *given)

    monkeypatch.setattr(RowsInFile, "prefetch", asked)
    monkeypatch.setattr(RowsInFile, "rows", read)
    monkeypatch.setattr(TransformerEntropies, "entropies", decided)
    logits(bytelm.load(saved(tmp_path / "run"), tables="mapped").model)
    assert len(done) == 3 * 5
    for (first, wanted), second, (third, found) in zip(done[::3], done[1::3], done[2::3], strict=True):
        assert (first, second, third) == ("asked", "decided", "read") and wanted == found and len(found) % 6 == 0


def test_what_an_lm_does_with_packed_weights(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", dtype=torch.bfloat16)
    lm, whole = bytelm.load(run, weights="bf16", tables="mapped"), bytelm.load(run)
    assert lm.generate(TEXT, max_bytes=20, eos=False) == whole.generate(TEXT, max_bytes=20, eos=False, quantize="bf16")
    assert lm.patches(TEXT) == whole.patches(TEXT)
    assert lm.decompress(lm.compress(TEXT)) == TEXT
    assert lm.bits(TEXT)[0] == pytest.approx(whole.bits(TEXT)[0], rel=1e-2)
    assert lm.logprobs(TEXT, b" fox").sum() == pytest.approx(whole.logprobs(TEXT, b" fox").sum(), rel=1e-2)
    other = bytelm.load(run, weights="int8")
    with pytest.raises(bytelm.errors.DataError, match="another model"):
        other.decompress(lm.compress(TEXT))


@pytest.mark.parametrize("name", ["blt", "blt on n-grams", "tokens"])
def test_patches_need_the_patcher_alone(tmp_path: Path, name: str) -> None:
    run = saved(tmp_path / "run", name)
    bare, whole = load_patches(run), bytelm.load(run).model
    assert bare.get_parameter("embedding.weight" if name == "tokens" else "decoder.head.weight").is_meta
    np.testing.assert_array_equal(patch_view(bare, TEXT).opens, patch_view(whole, TEXT).opens)


def test_patches_of_a_model_that_cuts_them_itself_need_all_of_it(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "hnet")
    model = load_patches(run)
    np.testing.assert_array_equal(patch_view(model, TEXT).opens, patch_view(bytelm.load(run).model, TEXT).opens)


def test_a_saved_folder_is_loaded_too(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    bytelm.load(run).save_pretrained(tmp_path / "folder")
    near, far = (bytelm.load(tmp_path / name, weights="int8", tables="mapped").model for name in ("run", "folder"))
    np.testing.assert_array_equal(logits(near), logits(far))


def test_what_packed_weights_are_not_for(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    lm = bytelm.load(run, weights="int8")
    refused = {
        "load it without weights and tables": lambda: lm.save_pretrained(tmp_path / "folder"),
        "leave out dtype": lambda: bytelm.load(run, dtype=torch.float64, weights="int8"),
        'loaded with weights = "int8"': lambda: lm.generate(b"", quantize="bf16"),
    }
    for words, asked in refused.items():
        with pytest.raises(UsageError, match=words):
            asked()
    x = torch.ones(1, SMALL.local_dim, requires_grad=True)
    with pytest.raises(UsageError, match="for inference"):
        lm.model.decoder.head(x)  # pyright: ignore


def test_without_kernels_nothing_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path / "run")
    monkeypatch.setattr(packed, "reason", lambda _: "no C++ compiler was found")
    with pytest.raises(UsageError, match="no C\\+\\+ compiler was found; leave out weights and tables"):
        bytelm.load(run, weights="bf16")


# --- the file ---------------------------------------------------------------------------------------------------------


def file_of(run: Path) -> Path:
    return run / "checkpoints" / "step-00000000" / "model.safetensors"


def table_of(lm: LM) -> RowsInFile:
    return lm.model.encoder.embed.ngram.file  # pyright: ignore


@pytest.mark.fault("K9")
def test_a_file_that_changes_while_its_rows_are_read(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    lm = bytelm.load(run, tables="mapped")
    lm.generate(TEXT, max_bytes=2)
    stat = file_of(run).stat()
    os.utime(file_of(run), ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was written to while it was in use: load it again"):
        lm.generate(TEXT, max_bytes=2)


@pytest.mark.fault("K9")
def test_a_file_that_is_cut_short_while_its_rows_are_read(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    lm = bytelm.load(run, tables="mapped")
    os.truncate(file_of(run), table_of(lm).start + 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed after it was written.*load it again"):
        lm.generate(TEXT, max_bytes=2)


@pytest.mark.fault("K9")
def test_a_disk_that_fails_while_its_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = bytelm.load(saved(tmp_path / "run"), tables="mapped")

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(PositionReader, "_read", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\): load it again"):
        lm.generate(TEXT, max_bytes=2)


def test_a_file_that_vanishes_stays_readable(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    lm, whole = bytelm.load(run, tables="mapped"), bytelm.load(run)
    file_of(run).unlink()
    assert lm.generate(TEXT, max_bytes=9) == whole.generate(TEXT, max_bytes=9)


@pytest.mark.fault("K1")
@pytest.mark.parametrize("which", ["latent.blocks.0.attention.qkv.weight", "decoder.norm.weight"])
def test_a_damaged_tensor_is_found_when_it_is_read(tmp_path: Path, which: str) -> None:
    run = saved(tmp_path / "run")
    start = packed.stored_tensors(file_of(run).parent)[which].start
    data = bytearray(file_of(run).read_bytes())
    data[start + 1] ^= 4
    file_of(run).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged: the checksum of {re.escape(which)}"):
        bytelm.load(run, weights="int8", tables="mapped")


@pytest.mark.fault("K3")
@pytest.mark.parametrize("tables", ["mapped", "memory"])
@pytest.mark.parametrize("which", ["latent.blocks.0.feed_forward.gate_up.weight", "decoder.norm.weight"])
def test_weights_that_are_not_finite(tmp_path: Path, which: str, tables: Any) -> None:
    tensors = weights_of(RECIPES["blt"])
    tensors[which].view(-1)[1] = float("inf")
    run = kept(tmp_path / "run", "blt", tensors)
    with pytest.raises(CheckpointError, match=r"not finite +[a-z_.0]+ +NaN or Inf in 1 of"):
        bytelm.load(run, weights="bf16", tables=tables)


@pytest.mark.fault("K10")
def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path / "run")
    monkeypatch.setattr(packed, "WORKING", 0)
    enough = {"needed": 1 << 30}
    monkeypatch.setattr(packed, "memory", lambda: Memory(1 << 30, enough["needed"]))
    recipe = RECIPES["blt"].build_on_meta()
    numbers = sum(p.numel() for p in recipe.parameters())
    enough["needed"] = 4 * numbers - 1
    with pytest.raises(ResourceError, match=r'needs .* are free: load it with weights="bf16", tables="mapped"'):
        bytelm.load(run, tables="memory")
    with pytest.raises(ResourceError, match=r'needs .* are free: load it with weights="bf16", tables="mapped"'):
        bytelm.load(run)
    enough["needed"] = 10
    with pytest.raises(ResourceError, match=r"--weights int8 --tables mapped need the least, .*: close other programs"):
        bytelm.load(run, weights="bf16", tables="memory")


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    tensors = weights_of(RECIPES["blt"])
    tensors["decoder.head.weight"] = tensors["decoder.head.weight"][:, :-1].clone()
    run = kept(tmp_path / "run", "blt", tensors)
    with pytest.raises(CheckpointError, match=r"shape +decoder\.head\.weight"):
        bytelm.load(run, weights="int8")


# --- what was stored in int8 ------------------------------------------------------------------------------------------


def test_weights_that_are_stored_in_int8(tmp_path: Path) -> None:
    """They are packed as they are; tables are read row by row, with the scale of each."""
    run = saved(tmp_path / "run")
    convert(run, "bytelm", tmp_path / "weights", {}, weights="int8")
    small = bytelm.load(tmp_path / "weights", tables="mapped").model
    assert small.quantization == "int8"
    np.testing.assert_array_equal(logits(small), logits(bytelm.load(run).model, quantize="int8"))

    convert(run, "bytelm", tmp_path / "tables", {}, tables="int8")
    near, far = (bytelm.load(tmp_path / "tables", tables=where).model for where in ("memory", "mapped"))
    restored = bytelm.load(tmp_path / "tables").model
    np.testing.assert_array_equal(logits(near), logits(restored))
    np.testing.assert_array_equal(logits(far), logits(restored))
    assert not np.array_equal(logits(far), logits(bytelm.load(run).model))
    assert far.encoder.embed.ngram.weight.dtype == torch.int8  # pyright: ignore


# --- what nobody should do --------------------------------------------------------------------------------------------


def test_copies_of_a_packed_model(tmp_path: Path) -> None:
    lm = bytelm.load(saved(tmp_path / "run"), weights="int8", tables="mapped")
    np.testing.assert_array_equal(logits(copy.deepcopy(lm.model)), logits(lm.model))


def test_what_was_packed_is_neither_rounded_again_nor_widened(tmp_path: Path) -> None:
    lm = bytelm.load(saved(tmp_path / "run"), tables="mapped")
    with pytest.raises(UsageError, match='loaded with weights as they are in the file: load it with weights="int8"'):
        lm.generate(b"", quantize="int8")
    lm.model.double()
    with pytest.raises(UsageError, match="packed weights are computed in float32"):
        lm.generate(b"")


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_float16_is_read_and_float64_refused(tmp_path: Path, weights: Any) -> None:
    run = saved(tmp_path / "half", dtype=torch.float16)
    whole = bytelm.load(run).model
    for where in ("mapped", "memory"):
        near = bytelm.load(run, weights=weights, tables=where).model
        np.testing.assert_array_equal(logits(near), logits(whole, quantize=weights))
    with pytest.raises(CheckpointError, match=r"dtype .* float64 \[.*\], not float32"):
        bytelm.load(saved(tmp_path / "double", dtype=torch.float64), weights=weights, tables="mapped")


def test_a_file_that_is_replaced_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tables are not read from another file than the one that was compared."""
    run, compare = saved(tmp_path / "run"), packed.compare

    def replaced(*given: Any) -> None:
        compare(*given)
        (tmp_path / "other").write_bytes(bytes(file_of(run).stat().st_size))
        (tmp_path / "other").replace(file_of(run))

    monkeypatch.setattr(packed, "compare", replaced)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was written to while it was in use"):
        bytelm.load(run, tables="mapped")


def test_a_small_model_is_not_refused_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path / "run")
    monkeypatch.setattr(packed, "memory", lambda: Memory(1 << 30, 2 << 20))
    for options in ({}, {"weights": "int8"}, {"weights": "bf16", "tables": "mapped"}):
        bytelm.load(run, **options)  # pyright: ignore


def test_weights_that_are_not_finite_have_their_names(tmp_path: Path) -> None:
    tensors, name = weights_of(RECIPES["blt"]), "latent.blocks.0.attention.qkv.weight"
    tensors[name][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=re.escape(f"not finite  {name}  NaN or Inf in 1 of")):
        bytelm.load(kept(tmp_path / "run", "blt", tensors), weights="int8")


def whole_numbers(run: Path, name: str, scale: float) -> Path:
    """A run of which one weight is in int8."""
    tensors = weights_of(RECIPES["blt"])
    tensors[f"{name}.weight"] = torch.ones_like(tensors[f"{name}.weight"], dtype=torch.int8)
    return kept(run, "blt", tensors | {f"{name}.scale": torch.full(tensors[f"{name}.weight"].shape[:1], scale)})


@pytest.mark.parametrize("tables", ["mapped", "memory"])
@pytest.mark.parametrize("name", ["latent.blocks.0.attention.qkv", "encoder.embed.ngram"])
def test_scales_that_are_not_finite(tmp_path: Path, name: str, tables: Any) -> None:
    run = whole_numbers(tmp_path / "run", name, float("nan"))
    with pytest.raises(CheckpointError, match=rf"not finite +{name}\.scale"):
        bytelm.load(run, tables=tables)


def test_int8_where_it_is_neither_packed_nor_looked_up(tmp_path: Path) -> None:
    run = whole_numbers(tmp_path / "run", "encoder.embed.byte", 0.5)
    np.testing.assert_array_equal(logits(bytelm.load(run, tables="mapped").model), logits(bytelm.load(run).model))
    with pytest.raises(CheckpointError, match=r"unexpected +decoder\.norm\.scale"):
        bytelm.load(whole_numbers(tmp_path / "norm", "decoder.norm", 0.5), tables="mapped")


def described(run: Path, change: Any, data: bytes | None = None) -> None:
    """Change what the manifest says of the file of weights, and the file."""
    folder = file_of(run).parent
    if data is not None:
        file_of(run).write_bytes(data)
    body = json.loads((folder / store.MANIFEST).read_text())
    del body["sha256"]
    change(body["files"]["model.safetensors"])
    text = json.dumps({**body, "sha256": manifest.digest(body)})
    (folder / store.MANIFEST).write_text(text)


def test_a_tensor_without_a_checksum_is_checked_with_its_file(tmp_path: Path) -> None:
    run, name = saved(tmp_path / "run"), "latent.blocks.0.attention.qkv.weight"
    data = bytearray(file_of(run).read_bytes())
    data[packed.stored_tensors(file_of(run).parent)[name].start] ^= 1
    described(run, lambda entry: entry["tensors"].pop(name), bytes(data))
    with pytest.raises(CheckpointError, match="its checksum is not that in MANIFEST"):
        bytelm.load(run, tables="mapped")


@pytest.mark.parametrize("options", [{}, {"tables": "mapped"}], ids=["whole", "packed"])
def test_a_shape_that_torch_refuses(tmp_path: Path, options: Any) -> None:
    run = saved(tmp_path / "run")
    data = file_of(run).read_bytes()
    length = int.from_bytes(data[:8], "little")
    end = len(data) - 8 - length
    entry = {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [end, end]}
    text = json.dumps({**json.loads(data[8 : 8 + length]), "empty": entry}).encode()
    data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    described(run, lambda e: e.update(size=len(data), sha256=hashlib.sha256(data).hexdigest()), data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        bytelm.load(run, **options)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", [{}, {"tables": "mapped"}], ids=["whole", "packed"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, options: Any) -> None:
    run = saved(tmp_path / "run")
    file_of(run).unlink()
    os.mkfifo(file_of(run))
    with pytest.raises(CheckpointError, match="not a plain file"):
        bytelm.load(file_of(run).parent, **options)


def test_a_save_that_was_killed_does_not_stand_in_the_way(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    (tmp_path / "other" / "checkpoints" / "step-00000000.tmp-x").mkdir(parents=True)
    convert(run, "bytelm", tmp_path / "other", {})
    with pytest.raises(CheckpointError, match="already exists"):
        convert(run, "bytelm", tmp_path / "other", {})
    np.testing.assert_array_equal(logits(bytelm.load(tmp_path / "other").model), logits(bytelm.load(run).model))


def test_a_damaged_newest_checkpoint_names_the_intact_one(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    store.save(run, 1, {"model": weights_of(RECIPES["blt"])}, {"recipe": to_mapping(RECIPES["blt"]), "context": 64})
    newest = run / "checkpoints" / "step-00000001" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the latest intact one is .*step-00000000: name it instead"):
        bytelm.load(run, weights="int8")


def test_memory_that_runs_out_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a limit that the system does not tell: in one line, and not as a damaged file."""
    run = saved(tmp_path / "run")

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    for where, what, options in ((packed, "read", {"weights": "int8"}), (store, "read", {})):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, refuse)
            with pytest.raises(ResourceError, match=r"did not fit into cpu's .* of memory"):
                bytelm.load(run, **options)  # pyright: ignore
