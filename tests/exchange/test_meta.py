"""Published BLTs in Meta's layouts, and of every size that there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bytelm import load
from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import to_mapping
from bytelm.exchange.convert import convert, export
from bytelm.models.blt import model as blt
from bytelm.models.blt import names
from bytelm.models.blt.formats import hf
from bytelm.models.transformer import entropy_model as transformer
from bytelm.patching import entropy, space
from exchanging import META, PUBLISHED, download, held, ours, recipe_of, same
from published import TEXTS, Pair, edit, pair, transformers


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random model and its conversion, of one shape."""
    return pair(tmp_path_factory.mktemp("one"), global_dim=48, functions=2, sizes=(2, 5))


# ---- Meta's layouts --------------------------------------------------------------------------------------------------


def test_both_layouts_of_meta_are_the_same_model(
    one: Pair, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(hub, "meta", tmp_path / "hub", {})
    folder = download(hub, tmp_path / "blt")
    convert(folder, "meta", tmp_path / "download", {})
    monkeypatch.chdir(folder)
    convert(Path(), "meta", tmp_path / "here", {})
    for run in ("hub", "download", "here"):
        assert same(held(tmp_path / run), held(one.run))
        assert recipe_of(tmp_path / run) == recipe_of(one.run)


def test_meta_keeps_the_tables_and_the_entropy_model_apart(hub: Path) -> None:
    weights = load_file(hub / hf.WEIGHTS)
    assert {name for name in weights if name.startswith("encoder_hash_tok_embedding.")} == {
        f"encoder_hash_tok_embedding.{table}.weight" for table in range(4)
    }
    assert not any("entropy" in name for name in weights)
    own = torch.load(hub / names.ENTROPY_MODEL / "consolidated.pth")["model"]
    assert {"tok_embeddings.weight", "layers.1.attention.wq.weight", "output.weight"} <= own.keys()


def test_meta_has_the_tensors_of_transformers_under_its_names(one: Pair, hub: Path) -> None:
    wanted: dict[str, Tensor] = {}
    for name, tensor in load_file(one.folder / hf.WEIGHTS).items():
        word = next((word for word in META if f".{word}.weight" in f".{name}"), None)
        new = name.replace(word, META[word]) if word else name
        tables = tensor.chunk(4) if "hash_tok" in name else (tensor,)
        words = [f"{new[:-7]}.{i}.weight" for i in range(4)] if len(tables) > 1 else [new]
        wanted |= {word.removeprefix("model."): table for word, table in zip(words, tables, strict=True)}
    own = torch.load(hub / names.ENTROPY_MODEL / "consolidated.pth")["model"]
    found = load_file(hub / hf.WEIGHTS) | {f"patcher.{name}": tensor for name, tensor in own.items()}
    assert same(found, wanted)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"threshold": 0.5}, entropy.Config(0.5, max_length=None, max_single_byte_run=None)),
        ({"threshold": 1, "max_patch_length": 7}, entropy.Config(1.0, max_length=7, max_single_byte_run=None)),
        (
            {"threshold": 0.5, "monotonicity": True},
            entropy.Config(relative_threshold=0.5, rule="relative", max_length=None, max_single_byte_run=None),
        ),
        (
            {"threshold": 0.5, "threshold_add": 0.25, "monotonicity": False},
            entropy.Config(0.5, 0.25, rule="both", max_length=None, max_single_byte_run=None),
        ),
        ({"patching_mode": "space", "max_patch_length": 9}, space.Config(max_length=9, max_single_byte_run=None)),
    ],
    ids=["threshold", "bounded", "relative", "both", "space"],
)
def test_patches_are_cut_as_the_training_says(hub: Path, tmp_path: Path, said: dict[str, Any], wanted: Any) -> None:
    """And what our export says of such a model is the same again; patches of spaces leave the entropy model out."""
    shutil.copytree(hub, tmp_path / "meta")
    args = {"patching_mode": "entropy", **said}
    edit(tmp_path / "meta" / "train_args.json", lambda table: table["data"].update(patcher_args=args))
    convert(tmp_path / "meta", "meta", tmp_path / "run", {})
    model = load(tmp_path / "run").model
    assert isinstance(model, blt.BLT) and model.patcher.config == wanted
    scored = isinstance(wanted, entropy.Config)
    assert scored == any(name.startswith("patcher.") for name in held(tmp_path / "run"))
    if scored:
        export(tmp_path / "run", "meta", tmp_path / "out", {})
        convert(tmp_path / "out", "meta", tmp_path / "again", {})
        assert recipe_of(tmp_path / "again") == recipe_of(tmp_path / "run")


def test_several_crossed_encoder_layers_go_to_meta_and_back(tmp_path: Path) -> None:
    """Queries are carried from layer to layer there, as here; transformers cannot say it."""
    config = blt.replace(blt.Config.tiny()["all layers crossed, widened"], ffn_dims=())
    entropy_model = transformer.Config(layers=1, dim=16, heads=2, attention_window=5)
    recipe = Recipe(config, entropy.Config(5.0, max_length=None, max_single_byte_run=None), entropy_model)
    model = recipe.build()
    model.init_weights(0)
    (tmp_path / "run").mkdir()
    weights = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    store.save(tmp_path / "run", 3, {"model": weights}, {"recipe": to_mapping(recipe), "context": 64})
    export(tmp_path / "run", "meta", tmp_path / "meta", {})
    assert json.loads((tmp_path / "meta" / "config.json").read_text())["args"]["cross_attn_all_layers_encoder"] is True
    convert(tmp_path / "meta", "meta", tmp_path / "again", {})
    assert same(held(tmp_path / "again"), weights)
    assert torch.equal(ours(tmp_path / "again", TEXTS), ours(tmp_path / "run", TEXTS))


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_have_these_names_and_shapes(tmp_path: Path, size: str) -> None:
    """Without memory: what transformers builds, what our recipe of its config.json does, and what papers count."""
    more, count = PUBLISHED[size]
    config = transformers.BltConfig(**more)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        wanted = transformers.BltForCausalLM(config).state_dict()
    recipe, context, layer = hf.described(tmp_path)
    likes = recipe.build_on_meta().state_dict()
    found: dict[str, Tensor] = {}
    for match in names.matches(likes, recipe.model, "hf", layer):
        found |= match.split(likes[match.ours])
    assert {name: like.shape for name, like in found.items()} == {name: like.shape for name, like in wanted.items()}
    entropy_model = sum(like.numel() for name, like in likes.items() if name.startswith("patcher."))
    assert entropy_model == pytest.approx(99.5e6, rel=2e-3)
    assert sum(like.numel() for like in likes.values()) - entropy_model == pytest.approx(count, rel=2e-3)
    assert context == 24_576
