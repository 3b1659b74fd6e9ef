"""Weights are read by rows while they are written, from files that may be missing, cut short, or change meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bytelm.checkpoint import tensors
from bytelm.checkpoint.tensors import DTYPES
from bytelm.errors import CheckpointError, ResourceError
from bytelm.exchange import convert as making
from bytelm.exchange import files
from bytelm.exchange.convert import convert
from bytelm.models.blt.formats import hf
from bytelm.models.blt.names import ENTROPY_MODEL
from bytelm.units import VOCAB
from exchanging import META, PUBLISHED, download, held, refused, same, spoil
from published import Pair, transformers

EMBEDDING = "model.local_encoder.embed_tokens.weight"
TABLE = "model.encoder_hash_tok_embedding.weight"


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(tensors, "PIECE", size)


@pytest.mark.parametrize("size", [1, 200, 1000])
def test_pieces_of_any_size_make_the_same_run(
    one: Pair, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """In shards, and in pickles whose tensors share memory or have strides of their own."""
    small_pieces(monkeypatch, size)
    convert(in_shards(Path(shutil.copytree(one.folder, tmp_path / "hf")), 3), "hf", tmp_path / "run", {})
    assert same(held(tmp_path / "run"), held(one.run))
    folder = download(hub, tmp_path / "meta")
    weights = torch.load(folder / "consolidated.pth")["model"]
    root = "local_decoder.layers.0.attention"
    keys, values = (f"{root}.{name}.weight" for name in ("wk", "wv"))
    both = torch.cat([weights[keys], weights[values]])
    weights[keys], weights[values] = both.chunk(2)
    weights[f"{root}.wo.weight"] = weights[f"{root}.wo.weight"].T.contiguous().T
    torch.save({name: torch.nn.Parameter(weight) for name, weight in weights.items()}, folder / "consolidated.pth")
    convert(folder, "meta", tmp_path / "of meta", {})
    assert same(held(tmp_path / "of meta"), held(one.run))


# ---- shards ----------------------------------------------------------------------------------------------------------


def in_shards(folder: Path, count: int) -> Path:
    """Make several files and an index of a folder's weights."""
    weights = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    where: dict[str, str] = {}
    for i in range(count):
        part = {name: weights[name] for name in sorted(weights)[i::count]}
        save_file(part, folder / shard(i))
        where |= dict.fromkeys(part, shard(i))
    (folder / f"{hf.WEIGHTS}{files.INDEX}").write_text(json.dumps({"weight_map": where}))
    return folder


def shard(i: int) -> str:
    return f"model-{i}.safetensors"


def without(folder: Path) -> None:
    (folder / shard(1)).unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / shard(1), (folder / shard(1)).stat().st_size - 1)


def cut_in_the_header(folder: Path) -> None:
    os.truncate(folder / shard(1), 100)


def emptied(folder: Path) -> None:
    os.truncate(folder / shard(1), 0)


def another(folder: Path) -> None:
    shutil.copy(folder / shard(0), folder / shard(1))


def a_page(folder: Path) -> None:
    (folder / shard(1)).write_text("<!DOCTYPE html><html>403</html>")


def a_folder(folder: Path) -> None:
    (folder / shard(1)).unlink()
    (folder / shard(1)).mkdir()


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (without, "model-1.safetensors is missing"),
    (cut, "model-1.safetensors is not a safetensors file that can be read: its tensors take"),
    (cut_in_the_header, "model-1.safetensors is not a safetensors file that can be read: its header would be"),
    (emptied, "model-1.safetensors is not a safetensors file that can be read: its header would be"),
    (another, "which its files do not contain"),
    (a_page, "model-1.safetensors is not a safetensors file"),
    (a_folder, "model-1.safetensors is not a plain file"),
]


@pytest.mark.fault("K6")
@pytest.mark.parametrize(("breaking", "told"), BROKEN, ids=[one.__name__ for one, _ in BROKEN])
def test_broken_shards_are_named_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, breaking: Callable[[Path], None], told: str
) -> None:
    breaking(in_shards(folder, 3))
    monkeypatch.setattr(making, "keep", lambda *_: pytest.fail("something would have been written"))
    assert told in refused(folder, error=CheckpointError)


def test_a_tensor_in_two_shards_is_that_of_the_index(one: Pair, folder: Path) -> None:
    in_shards(folder, 3)
    index = json.loads((folder / f"{hf.WEIGHTS}{files.INDEX}").read_text())["weight_map"]
    others = [shard(i) for i in range(3) if shard(i) != index[EMBEDDING]]
    for other in others:
        inside = load_file(folder / other)
        save_file(inside | {EMBEDDING: torch.zeros(VOCAB, 16)}, folder / other)
    convert(folder, "hf", folder.parent / "run", {})
    assert same(held(folder.parent / "run"), held(one.run))


# ---- while it is read ------------------------------------------------------------------------------------------------


def during(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any]) -> None:
    """Change the file of weights when the first of its tables is read, which is then past its header."""
    plain = files.Positions.read

    def read(self: files.Positions, start: int, like: Tensor) -> Tensor:
        if like.dtype != torch.uint8 and self.path.parent.name != ENTROPY_MODEL:
            change(self.path)
        return plain(self, start, like)

    monkeypatch.setattr(files.Positions, "read", read)


def shrink(file: Path) -> None:
    os.truncate(file, 4000)


def replace_in_place(file: Path) -> None:
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(0, file.stat().st_atime_ns))


@pytest.mark.fault("K6")
@pytest.mark.parametrize("layout", ["hf", "meta"])
@pytest.mark.parametrize("change", [shrink, replace_in_place])
def test_a_source_that_changes_while_it_is_read(
    folder: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, change: Any
) -> None:
    source = folder if layout == "hf" else download(hub, tmp_path)
    during(monkeypatch, change)
    assert "changed while it was read" in refused(source, layout, CheckpointError)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed there")
def test_a_source_that_is_removed_while_it_is_read_is_read_to_its_end(
    one: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(monkeypatch, lambda file: file.unlink(missing_ok=True))
    convert(folder, "hf", folder.parent / "run", {})
    assert same(held(folder.parent / "run"), held(one.run))


@pytest.mark.fault("K3")
def test_values_that_are_not_finite_are_counted_over_all_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that was written before they were met is left, not even the folders that were made."""
    small_pieces(monkeypatch, 64)
    spoil(folder, lambda weights: weights[TABLE][::7, 3].fill_(torch.nan))
    count = len(load_file(folder / hf.WEIGHTS)[TABLE])
    with pytest.raises(CheckpointError, match=f"{TABLE}  NaN or Inf in {-(-count // 7)} of {count * 16} values"):
        convert(folder, "hf", folder.parent / "new" / "newer" / "run", {})
    assert not (folder.parent / "new").exists()


def test_a_disk_that_is_too_small_is_refused_before_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little(path: Path) -> int:
        return 1000

    monkeypatch.setattr(making, "disk", little)
    assert "and the disk has 1 kB: make room" in refused(folder, error=ResourceError)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def sparse(file: Path, likes: dict[str, Tensor]) -> None:
    """A file of zeros that takes no room."""
    head = tensors.header(likes)
    file.write_bytes(head)
    os.truncate(file, len(head) + sum(like.nbytes for like in likes.values()))


@pytest.mark.parametrize("layout", ["hf", "meta"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_files_of_the_published_sizes_match_by_name_and_shape(tmp_path: Path, size: str, layout: str) -> None:
    """What transformers builds of the sizes, as files of 9 and 21 GB without content."""
    more, parameters = PUBLISHED[size]
    config = transformers.BltConfig(**more)
    with torch.device("meta"):
        likes = transformers.BltForCausalLM(config).to(torch.bfloat16).state_dict()
    assert set(DTYPES[like.dtype] for like in likes.values()) == {"BF16"}
    folder = tmp_path / "blt"
    folder.mkdir()
    if layout == "hf":
        config.save_pretrained(folder)
        sparse(folder / hf.WEIGHTS, likes)
    else:
        theirs = {new: like for name, tensor in likes.items() for new, like in of_meta(name, tensor).items()}
        own = {name: like for name, like in theirs.items() if name.startswith("patcher.")}
        sparse(folder / hf.WEIGHTS, {name: like for name, like in theirs.items() if name not in own})
        (folder / ENTROPY_MODEL).mkdir()
        empty = {name.removeprefix("patcher."): torch.zeros(like.shape, dtype=like.dtype) for name, like in own.items()}
        torch.save({"model": empty}, folder / ENTROPY_MODEL / "consolidated.pth")
        describe(folder, config)
    made = convert(folder, layout, tmp_path / "run", {}, dry_run=True, tables="int8")
    assert made.parameters == sum(like.numel() for like in likes.values()) == pytest.approx(parameters + 1e8, rel=2e-3)
    assert made.context == 24_576 and not (tmp_path / "run").exists()


def of_meta(name: str, like: Tensor) -> dict[str, Tensor]:
    """What Meta calls a tensor of transformers; its six tables are apart."""
    word = next((word for word in META if f".{word}.weight" in f".{name}"), None)
    new = (name.replace(word, META[word]) if word else name).removeprefix("model.")
    if "hash_tok" not in new:
        return {new: like}
    return {f"{new[:-7]}.{i}.weight": table for i, table in enumerate(like.chunk(6))}


def describe(folder: Path, config: Any) -> None:
    """The options of a configuration as Meta has them."""
    local, latent, own = config.encoder_config, config.global_config, config.patcher_config
    args: dict[str, Any] = {
        "vocab_size": 260,
        "dim_local_encoder": local.hidden_size,
        "dim_local_decoder": local.hidden_size,
        "dim_global": latent.hidden_size,
        "n_layers_local_encoder": local.num_hidden_layers,
        "n_layers_local_decoder": config.decoder_config.num_hidden_layers,
        "n_layers_global": latent.num_hidden_layers,
        "n_heads_local_encoder": local.num_attention_heads,
        "n_heads_local_decoder": local.num_attention_heads,
        "n_heads_global": latent.num_attention_heads,
        "rope_theta": 500_000.0,
        "cross_attn_k": config.cross_attn_k,
        "cross_attn_nheads": local.num_attention_heads,
        "cross_attn_all_layers_decoder": True,
        "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8],
        "encoder_hash_byte_group_nb_functions": 1,
        "encoder_hash_byte_group_vocab": 500_002,
        "patching_threshold": 1.335,
    }
    (folder / "config.json").write_text(json.dumps({"args": args}))
    sizes = {"dim": own.hidden_size, "n_layers": own.num_hidden_layers, "n_heads": own.num_attention_heads}
    (folder / ENTROPY_MODEL / "params.json").write_text(json.dumps({"entropy_model": {"vocab_size": 260, **sizes}}))
