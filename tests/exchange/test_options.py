"""Options of a published folder that cannot be, and what cannot be said in one, are told in a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm import load
from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, to_mapping
from bytelm.errors import BytelmError, CheckpointError, ConfigError, ResourceError
from bytelm.exchange import files
from bytelm.exchange.convert import convert, export
from bytelm.exchange.format import find_layout
from bytelm.models.blt import model as blt
from bytelm.models.blt.formats import hf
from bytelm.models.megabyte import model as megabyte
from bytelm.models.ngram import entropy_model as ngram
from bytelm.models.transformer import entropy_model as transformer
from bytelm.patching import entropy, space
from exchanging import refused, spoil
from published import Pair, edit

Edit = Callable[[dict[str, Any]], Any]
LARGE = 10**400  # JSON has integers that no float holds


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K7")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"text"', b"\xff", b"[" * 100_000, b"1" * 9999])
def test_a_configuration_that_is_no_table(folder: Path, content: bytes) -> None:
    (folder / hf.CONFIG).write_bytes(content)
    assert hf.CONFIG in refused(folder, error=CheckpointError)


@pytest.mark.parametrize("name", [hf.CONFIG, hf.WEIGHTS])
@pytest.mark.parametrize("what", ["missing", "not a plain file"])
def test_a_file_that_is_not_there(folder: Path, name: str, what: str) -> None:
    (folder / name).unlink()
    if what != "missing":
        (folder / name).mkdir()
    assert name in refused(folder, error=CheckpointError)


def at(*keys: str, value: Any) -> Edit:
    """Set an option that lies under some keys."""

    def change(table: dict[str, Any]) -> None:
        for key in keys[:-1]:
            table = table.setdefault(key, {})
        table[keys[-1]] = value

    return change


def without(*keys: str) -> Edit:
    """Take an option out that lies under some keys."""

    def change(table: dict[str, Any]) -> None:
        for key in keys[:-1]:
            table = table[key]
        del table[keys[-1]]

    return change


HEADS = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": None}
UNSUPPORTED: list[tuple[Edit, str]] = [
    (at("model_type", value="llama"), "model_type = 'llama'"),
    (at("vocab_size", value=259), "vocab_size = 259"),
    (at("vocab_size", value=260.5), "vocab_size = 260.5"),
    (at("patching_mode", value="space"), "patching_mode = 'space'"),
    (at("patch_in_forward", value=False), "patch_in_forward = False"),
    (at("patch_in_forward", value=1), "patch_in_forward = 1"),
    (at("patch_size", value=None), "patch_size = null"),
    (at("max_patch_length", value=8), "max_patch_length = 8"),
    (at("tie_word_embeddings", value=True), "tie_word_embeddings = True"),
    (at("local_attention_window_len", value=None), "local_attention_window_len = null"),
    (at("patcher_config", "sliding_window", value=None), "patcher_config: sliding_window = null"),
    (at("decoder_config", "hidden_act", value="gelu"), "decoder_config: hidden_act = 'gelu'"),
    (at("global_config", "num_key_value_heads", value=1), "global_config: num_key_value_heads = 1"),
    (at("encoder_config", "rms_norm_eps", value=1e-6), "encoder_config: rms_norm_eps = 1e-06"),
    (at("global_config", "rope_parameters", "rope_type", value="yarn"), "rope_parameters: rope_type = 'yarn'"),
    (at("global_config", "rope_scaling", value={"type": "linear", "factor": 2}), "global_config: rope_scaling = {"),
    (at("global_config", "rope_parameters", "rope_theta", value=1e4), "rope_theta = 500000.0, 10000.0"),
    (at("patcher_config", "rope_parameters", "rope_theta", value=0), "rope_theta = 0.0 must be above 0"),
    (at("decoder_config", "hidden_size", value=32), "hidden_size differs from the encoder's"),
    (at("decoder_config", value={**HEADS, "num_attention_heads": 4}), "num_attention_heads differs from the encoder's"),
    (at("decoder_config", "cross_attn_all_layers", value=False), "cross_attn_all_layers = False"),
    (at("global_config", "intermediate_size", value=LARGE), "intermediate_size = 1000"),
    (at("decoder_config", "intermediate_size", value=0), "intermediate_size = 0 is not from 1"),
]
WRONG: list[tuple[Edit, str]] = [
    (without("global_config"), "global_config"),
    (at("global_config", value=[1]), "global_config is not a table"),
    (without("decoder_config", "num_hidden_layers"), "decoder_config lacks num_hidden_layers"),
    (at("encoder_config", "num_hidden_layers", value=True), "num_hidden_layers = True"),
    (at("encoder_config", "num_attention_heads", value=0), "num_attention_heads = 0 is not from 1"),
    (at("encoder_config", "hidden_size", value="16"), "hidden_size = '16'"),
    (at("encoder_config", "hidden_size", value=-16), "hidden_size = -16 is not from 1"),
    (at("encoder_config", "hidden_size", value=LARGE), "hidden_size = 1000"),
    (at("encoder_config", "hidden_size", value=None), "lacks hidden_size"),
    (at("encoder_config", "hidden_size", value=[16] * 9999), "hidden_size = [16, 16"),
    (at("global_config", "num_hidden_layers", value=1 << 30), "num_hidden_layers = 1073741824"),
    (at("global_config", "num_attention_heads", value=3), "num_key_value_heads"),
    (at("patching_threshold", value="high"), "patching_threshold = 'high'"),
    (at("patching_threshold", value=float("nan")), "patching_threshold = nan"),
    (at("patching_threshold", value=float("inf")), "patching_threshold = inf"),
    (at("patching_threshold", value=LARGE), "patching_threshold = 1000"),
    (at("patching_threshold", value=True), "patching_threshold = True"),
    (at("encoder_hash_byte_group_size", value="345"), "encoder_hash_byte_group_size = '345'"),
    (at("encoder_hash_byte_group_size", value=[3, "4"]), "encoder_hash_byte_group_size = [3, '4']"),
    (at("encoder_hash_byte_group_size", value=[3] * 9999), "encoder_hash_byte_group_size = [3, 3"),
    (at("encoder_hash_byte_group_size", value=[1]), "ngram_sizes"),
    (at("encoder_hash_byte_group_vocab", value=0), "encoder_hash_byte_group_vocab = 0"),
    (at("encoder_hash_byte_group_nb_functions", value=99), "ngram_functions"),
    (at("cross_attn_k", value=1.0), "cross_attn_k = 1.0"),
]


@pytest.mark.fault("K7")
@pytest.mark.parametrize(("change", "told"), [*UNSUPPORTED, *WRONG], ids=[told for _, told in [*UNSUPPORTED, *WRONG]])
def test_options_that_cannot_be_are_named(folder: Path, change: Edit, told: str) -> None:
    edit(folder / hf.CONFIG, change)
    assert told in refused(folder)


THEIRS: list[tuple[str, Edit, str]] = [
    ("config.json", at("args", "vocab_size", value=256), "vocab_size = 256"),
    ("config.json", at("args", "norm_eps", value=1e-6), "norm_eps"),
    ("config.json", at("args", "n_kv_heads", value=1), "n_kv_heads = 1"),
    ("config.json", at("args", "cross_attn_window_encoder", value=4), "cross_attn_window_encoder = 4"),
    ("config.json", at("args", "cross_attn_all_layers_decoder", value=False), "cross_attn_all_layers_decoder"),
    ("config.json", at("args", "downsampling_by_pooling", value="mean"), "downsampling_by_pooling = 'mean'"),
    ("config.json", at("args", "encoder_enable_byte_ngrams", value=True), "encoder_enable_byte_ngrams"),
    ("config.json", at("args", "dim_local_decoder", value=32), "dim_local_decoder = 32"),
    ("config.json", at("args", "dim_global", value=16), "dim_global is dim_local_encoder"),
    ("config.json", at("args", "local_attention_window_len", value=None), "local_attention_window_len = null"),
    ("config.json", at("args", "rope_theta", value=-1), "rope_theta = -1.0"),
    ("config.json", at("args", "cross_attn_nheads", value=0), "cross_attn_nheads = 0"),
    ("config.json", without("args", "cross_attn_k"), "lacks cross_attn_k"),
    ("train_args.json", at("data", "patcher_args", "patching_mode", value="static"), "patching_mode = 'static'"),
    ("train_args.json", at("data", "patcher_args", "threshold", value=None), "patcher_args lacks threshold"),
    ("train_args.json", at("data", "patcher_args", "threshold_add", value="a"), "threshold_add = 'a'"),
    ("train_args.json", at("data", "patcher_args", "monotonicity", value=1), "monotonicity = 1"),
    ("train_args.json", at("data", "patcher_args", "max_patch_length", value="8"), "max_patch_length = '8'"),
    ("entropy_model/params.json", at("entropy_model", value=3), "params.json is not a table"),
    ("entropy_model/params.json", at("entropy_model", "n_heads", value=5), "n"),
]


@pytest.mark.fault("K7")
@pytest.mark.parametrize(("file", "change", "told"), THEIRS, ids=[told for *_, told in THEIRS])
def test_options_of_meta_that_cannot_be_are_named(theirs: Path, file: str, change: Edit, told: str) -> None:
    edit(theirs / file, change)
    assert told in refused(theirs, "meta")


def test_a_folder_of_meta_that_lacks_something(theirs: Path, tmp_path: Path) -> None:
    (theirs / "train_args.json").unlink()
    edit(theirs / "entropy_model" / "params.json", without("data"))
    assert "does not contain its patching" in refused(theirs, "meta")
    (theirs / "entropy_model" / "params.json").unlink()
    edit(theirs / "config.json", at("args", "patching_threshold", value=1.0))
    assert "entropy_model/params.json" in refused(theirs, "meta", CheckpointError)
    spoil(theirs, lambda weights: weights.update({"local_encoder.layers.0.feed_forward.w1.weight": torch.zeros(())}))
    assert "local_encoder.layers.0.feed_forward.w1.weight" in refused(theirs, "meta", CheckpointError)
    (theirs / "config.json").unlink()
    assert "neither config.json nor params.json" in refused(theirs, "meta", CheckpointError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(LARGE) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(table: Any, *keys: str) -> list[tuple[str, ...]]:
    """Every option of a table, under its keys, and each table in it."""
    own = [keys] if keys else []
    return (
        own + [place for key, value in table.items() for place in places(value, *keys, key)]
        if isinstance(table, dict)
        else own
    )


@pytest.mark.fault("K7")
@settings(max_examples=150)
@given(st.data())
def test_any_json_as_an_option_is_a_recipe_or_an_error_of_ours(
    one: Pair, hub: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    layout, source, file = data.draw(
        st.sampled_from(
            [
                ("hf", one.folder, hf.CONFIG),
                ("meta", hub, "config.json"),
                ("meta", hub, "train_args.json"),
                ("meta", hub, "entropy_model/params.json"),
            ]
        )
    )
    home = tmp_path_factory.mktemp("any") / "folder"
    shutil.copytree(source, home, copy_function=os.link)
    table = json.loads((home / file).read_text())
    place = data.draw(st.sampled_from(places(table)))
    at(*place, value=data.draw(JSON))(table)
    (home / file).unlink()
    (home / file).write_text(json.dumps(table))
    with files.ExitStack() as stack:
        try:
            opened = find_layout(layout).read(home, {}, stack)
        except BytelmError as error:
            assert "\n" not in str(error) or "does not hold the weights" in str(error)
        else:
            assert build(Recipe, to_mapping(opened.recipe), "again") == opened.recipe


# ---- settings over a folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ({"model": {"name": "megabyte"}}, "--set model.name"),
        ({"entropy_model": {"name": "ngram"}}, "--set entropy_model.name"),
        ({"patching": {"rule": "relative"}}, "patching.relative_threshold is not set"),
        ({"patching": {"treshold": 1.0}}, "did you mean patching.threshold"),
        ({"patching": {"name": "nothing"}}, "patching"),
    ],
)
def test_settings_that_cannot_be(folder: Path, sets: dict[str, Any], told: str) -> None:
    assert told in refused(folder, **sets)


def test_settings_that_the_weights_are_not_of(folder: Path) -> None:
    told = refused(folder, error=CheckpointError, table=True, model={"global_layers": 3})
    assert "missing     model.global_transformer.layers.2.self_attn.q_proj.weight  float32 [32, 32]" in told


def test_patches_of_spaces_leave_the_entropy_model_out(folder: Path) -> None:
    convert(folder, "hf", folder.parent / "run", {"patching": {"name": "space"}})
    model = load(folder.parent / "run").model
    assert isinstance(model, blt.BLT) and isinstance(model.patcher, space.Space)


# ---- places ----------------------------------------------------------------------------------------------------------


def test_nothing_that_is_there_is_written_over(one: Pair, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=f"{name} already exists"):
            convert(one.folder, "hf", tmp_path / name, {})
        for layout in ("hf", "meta"):
            with pytest.raises(CheckpointError, match=f"{name} already exists"):
                export(one.run, layout, tmp_path / name, {})
    assert (tmp_path / "full" / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
    convert(one.folder, "hf", tmp_path / "run", {})  # an empty folder is as good as none
    export(one.run, "meta", tmp_path / "out", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "out", "run"]


def test_sources_that_are_not_there(one: Pair, tmp_path: Path) -> None:
    for layout in ("hf", "meta"):
        assert "is not a folder" in refused(tmp_path / "none", layout, CheckpointError)
        with pytest.raises(CheckpointError, match="no run at"):
            export(tmp_path / "none", layout, tmp_path / "out", {})
    assert "is not a folder" in refused(one.folder / hf.CONFIG, "hf", CheckpointError)
    with pytest.raises(CheckpointError, match="is of model_type 'blt'"):
        export(one.folder, "hf", tmp_path / "out", {})
    with pytest.raises(ResourceError, match="cannot make"):
        convert(one.folder, "hf", one.folder / hf.CONFIG / "run", {})
    with pytest.raises(ResourceError, match="cannot write"):
        export(one.run, "hf", one.folder / hf.CONFIG / "out", {})


@pytest.mark.fault("T9")
@pytest.mark.parametrize("job", ["convert", "hf", "meta", "meta, entropy model"])
def test_a_full_disk_leaves_nothing(small_disk: Path, one: Pair, job: str) -> None:
    """And once there is room, the same command works."""
    target = small_disk / "new"
    free = os.statvfs(small_disk).f_bfree * os.statvfs(small_disk).f_bsize
    size = (one.folder / hf.WEIGHTS).stat().st_size
    spare = size // 2
    if job == "meta, entropy model":  # it comes last, and is written by torch
        own = sum(
            t.nbytes for name, t in store.read_tensors(store.newest(one.run), "model").items() if "patcher" in name
        )
        spare = size - own // 2
    (small_disk / "filler").write_bytes(bytes(free - spare))

    def do() -> None:
        if job == "convert":
            convert(one.folder, "hf", target, {})
        else:
            export(one.run, "hf" if job == "hf" else "meta", target, {})

    with pytest.raises(ResourceError, match=r"No space left|make room"):
        do()
    left = [path.name for path in small_disk.rglob("*") if path.is_file()]
    assert left == ["filler"]
    (small_disk / "filler").unlink()
    do()
    assert [*target.rglob("*.safetensors")]


# ---- what cannot be said elsewhere -----------------------------------------------------------------------------------


SMALL = blt.Config.tiny()["last layer crossed"]
CUT = entropy.Config(1.0, max_length=None, max_single_byte_run=None)
ENTROPY_MODEL = transformer.Config(layers=1, dim=16, heads=2)
GUARDED = entropy.Config(1.0)
BOTH = ("hf", "meta")
UNSAID: list[tuple[str, tuple[str, ...], Recipe, str]] = [
    ("MEGABYTE", BOTH, Recipe(next(iter(megabyte.Config.tiny().values()))), "a megabyte cannot be exported"),
    ("patches of spaces", BOTH, Recipe(SMALL, space.Config()), "only entropy patching"),
    (
        "n-gram scorer",
        BOTH,
        Recipe(SMALL, CUT, ngram.Config(order=2, rows=256)),
        "a Transformer entropy model",
    ),
    ("newlines", BOTH, Recipe(SMALL, CUT, transformer.Config(reset_newline=True)), "reset_newline"),
    (
        "guards",
        ("hf",),
        Recipe(SMALL, GUARDED, ENTROPY_MODEL),
        "--set patching.max_length=none --set patching.max_single_byte_run=none",
    ),
    ("singles", ("meta",), Recipe(SMALL, GUARDED, ENTROPY_MODEL), "--set patching.max_single_byte_run=none"),
    (
        "relative",
        ("hf",),
        Recipe(SMALL, entropy.Config(relative_threshold=1.0, rule="relative"), ENTROPY_MODEL),
        "patching.rule=relative",
    ),
    (
        "several crossed",
        ("hf",),
        Recipe(blt.Config.tiny()["all layers crossed, widened"], CUT, ENTROPY_MODEL),
        "encoder_cross",
    ),
    ("to the output", BOTH, Recipe(blt.Config.tiny()["n-grams to the output"], CUT, ENTROPY_MODEL), "ngram_output"),
    ("no n-grams", ("hf",), Recipe(blt.Config.tiny()["no n-grams"], CUT, ENTROPY_MODEL), "ngram_sizes"),
    (
        "widths",
        ("meta",),
        Recipe(blt.replace(SMALL, ffn_dims=(21, 50, 37)), CUT, ENTROPY_MODEL),
        "are 21 of width 16, 50 of",
    ),
    ("heads", ("hf",), Recipe(blt.replace(SMALL, cross_heads=1), CUT, ENTROPY_MODEL), "cross_heads = 1"),
]


@pytest.mark.parametrize(("layouts", "recipe", "told"), [case[1:] for case in UNSAID], ids=[case[0] for case in UNSAID])
def test_what_a_layout_cannot_say_is_not_exported(
    tmp_path: Path, layouts: tuple[Any, ...], recipe: Recipe, told: str
) -> None:
    run = random_run(recipe, tmp_path / "run")
    for layout in layouts:
        with pytest.raises(ConfigError) as caught:
            export(run, layout, tmp_path / "out", {})
        assert told in str(caught.value) and "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def random_run(recipe: Recipe, run: Path) -> Path:
    """A run of a model that was initialised and no more."""
    model = recipe.build()
    model.init_weights(0)
    weights = {name: torch.rand(t.shape).to(t.dtype) for name, t in model.state_dict().items()}
    run.mkdir()
    store.save(run, 1, {"model": weights}, {"recipe": to_mapping(recipe), "context": 64})
    return run


def test_guards_can_be_left_out_and_shapes_cannot_be_said_otherwise(tmp_path: Path) -> None:
    run = random_run(Recipe(SMALL, GUARDED, ENTROPY_MODEL), tmp_path / "run")
    bare = {"max_length": "none", "max_single_byte_run": "none"}
    export(run, "hf", tmp_path / "hf", {"patching": bare})
    export(run, "meta", tmp_path / "meta", {"patching": {"max_single_byte_run": "none"}})
    args = json.loads((tmp_path / "meta" / "train_args.json").read_text())["data"]["patcher_args"]
    assert args["max_patch_length"] == GUARDED.max_length
    with pytest.raises(CheckpointError, match=r"missing     latent\.blocks\.2"):
        export(run, "hf", tmp_path / "out", {"patching": bare, "model": {"global_layers": 3}})
    with pytest.raises(ConfigError, match=r"patching\.relative_threshold is not set"):
        export(run, "meta", tmp_path / "out", {"patching": {"max_single_byte_run": "none", "rule": "both"}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "meta", "run"]
