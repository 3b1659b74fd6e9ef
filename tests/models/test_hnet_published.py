"""Published H-Net checkpoints: logits of the networks that they describe, lossless both ways, refusals that say why."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.assemble import load as loaded
from bytelm.cli import run as cli
from bytelm.config import build, to_mapping
from bytelm.errors import BytelmError, CheckpointError, ConfigError
from bytelm.exchange.convert import convert, export
from bytelm.interfaces.objective import score
from bytelm.models.hnet import published as exchange
from bytelm.models.hnet.layers import Published
from bytelm.models.hnet.model import Config, HNet
from bytelm.testing.exact import exact
from bytelm.units import BOS, EOS, PAD, RESERVED
from published_hnet import SHAPES, Reference, options, published, tensors

NEAR = 1e-10  # in float64; logits are of order 1
DATA = "The quick brown fox, déjà vu: 0123456789\n".encode() + random.Random(0).randbytes(70)
HEADS = {"num_heads": [4, 4], "rotary_emb_dim": [4, 6], "window_size": [9, -1]}


def imported(folder: Path, name: str, **sets: Any) -> HNet:
    """The model of a run that was converted."""
    if not folder.exists():
        file = published(folder, SHAPES[name], tensors(SHAPES[name]))
        convert(file, "hnet", folder / "run", sets)
    model = loaded(folder / "run").model.eval()
    assert isinstance(model, HNet)
    return model


def theirs(logits: Tensor) -> Tensor:
    """Our logits in the places of theirs."""
    return torch.cat([logits[..., : exchange.THEIR_EOS], logits[..., EOS : EOS + 1]], -1)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_are_theirs_whole_and_in_pieces(name: str, tmp_path: Path) -> None:
    reference = Reference(SHAPES[name], tensors(SHAPES[name]))
    wanted = reference.logits([exchange.THEIR_BOS, *DATA])
    ids = torch.tensor([[BOS, *DATA]])
    with exact(imported(tmp_path / "at", name)) as model:
        whole = model(ids)[0][0]
        assert model.chunking is not None
        counts = [len(DATA) + 1, *(int(count) for count in model.chunking.counts)]
        assert all(2 < inner < outer for outer, inner in pairwise(counts))  # every network has some to read
        assert apart(theirs(whole), wanted) < NEAR
        state, found = model.initial_state(1), list[Tensor]()
        for part in ids[0].split([1] * 30 + [66, ids.shape[1] - 96]):
            logits, state = model(part[None], state)
            found.append(logits[0])
        assert apart(theirs(torch.cat(found)), wanted) < NEAR
        for length in (1, 2, 7):
            alone = reference.logits([exchange.THEIR_BOS, *DATA[: length - 1]])
            assert apart(theirs(model(ids[:, :length])[0][0]), alone) < NEAR


@torch.no_grad()
def test_documents_of_a_row_are_read_each_from_its_start(tmp_path: Path) -> None:
    name = "two stages, every kind of layer"
    reference = Reference(SHAPES[name], tensors(SHAPES[name]))
    documents = [DATA[:40], DATA[40:41], DATA[41:]]
    row = torch.tensor([[symbol for document in documents for symbol in (BOS, *document)]])
    wanted = torch.cat([reference.logits([exchange.THEIR_BOS, *document]) for document in documents])
    with exact(imported(tmp_path / "at", name)) as model:
        assert apart(theirs(model(row)[0][0]), wanted) < NEAR


# --- ids --------------------------------------------------------------------------------------------------------------


def test_bos_and_eos_are_the_ids_that_their_tokenizer_takes_for_them(tmp_path: Path) -> None:
    model, weights = imported(tmp_path / "at", "one stage"), tensors(SHAPES["one stage"])
    embedding, head = model.embed.byte.weight, model.head.weight
    for ours, source, row in (
        (embedding[BOS], "embeddings.weight", 254),
        (embedding[EOS], "embeddings.weight", 255),
        (head[EOS], "lm_head.weight", 255),
    ):
        assert torch.equal(ours, weights[source][row])
    assert not embedding[[PAD, RESERVED]].any() and not head[[255, PAD, BOS, RESERVED]].any()
    logits = model(torch.tensor([[BOS, *DATA]]))[0]
    assert bool((logits[..., [255, PAD, BOS, RESERVED]] == exchange.UNLIKELY).all())
    score(model, torch.tensor([[BOS, 0, 255, EOS]]))[0].backward()
    gradient = head.grad
    assert gradient is not None and gradient[EOS].any() and gradient[255].any() and model.head.bias.grad is None


# --- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_converting_and_exporting_loses_nothing(name: str, half: bool, tmp_path: Path) -> None:
    """As published, the most in bfloat16: dtypes and all bits, but of what was not theirs."""
    weights = tensors(SHAPES[name], half=half)
    file = published(tmp_path, SHAPES[name], weights)
    made = convert(file, "hnet", tmp_path / "run", {})
    assert made.context == 8192 and {row[0] for row in made.table} == set(weights) and all(row[2] for row in made.table)
    assert export(tmp_path / "run", "hnet", tmp_path / "out", {}).parameters == made.parameters
    back = torch.load(tmp_path / "out" / "model.pt")
    assert back.keys() == weights.keys()
    for key, weight in weights.items():
        assert back[key].dtype == weight.dtype and torch.equal(back[key], weight), key
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    given = SHAPES[name]
    assert written == {**given, "d_intermediate": [-(-one // 128) * 128 for one in given["d_intermediate"]]}
    convert(tmp_path / "out", "hnet", tmp_path / "again", {})
    first, second = (store.read_tensors(store.newest(tmp_path / run), "model") for run in ("run", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_what_was_trained_since_is_exported(tmp_path: Path) -> None:
    """Also BOS and EOS, in the rows of theirs."""
    imported(tmp_path / "at", "one stage")
    own = loaded(tmp_path / "at" / "run").model
    ours = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    ours["embed.byte.weight"][BOS] = 7.0
    ours["head.weight"][EOS] = 8.0
    found = exchange.exported(own.config, ours)
    assert bool((found["embeddings.weight"][254] == 7).all()) and bool((found["lm_head.weight"][255] == 8).all())


DEEP = ["m4", ["T1m4", ["T27"], "m4T1"], "m4"]
XL = options(DEEP, [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64], [1023, 1023, -1])
XL["ssm_cfg"]["d_state"] = 128
XL["attn_cfg"]["num_heads"] = [16] * 3


def test_the_largest_that_is_published_has_the_names_and_shapes_of_ours() -> None:
    """Of the two stages called XL, without memory for them."""
    made = exchange.described(XL, "hnet_2stage_XL.json")
    config: Config = made.model
    likes = made.build_on_meta().state_dict()
    names = {name: exchange.theirs(name, config) for name in likes if name != "head.bias"}
    found = {other: exchange.shaped(name, likes[name]).shape for name, other in names.items()}
    assert found == {name: weight.shape for name, weight in tensors(XL, "meta").items()}
    assert config.ratios == (3.0, 3.0) and config.encoder(0).attention_window == 1024
    assert config.innermost().attention_window is None
    assert build(Recipe, to_mapping(made), "here") == made
    total = sum(like.numel() for like in likes.values())
    assert 1.5e9 < total < 1.7e9


# --- files ------------------------------------------------------------------------------------------------------------


def test_where_the_two_files_may_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, weights = SHAPES["one stage"], tensors(SHAPES["one stage"])
    file = published(tmp_path / "a", config, weights)
    assert cli(["convert", str(file.parent), str(tmp_path / "of folder"), "--format", "hnet", "--dry-run"]) == 0
    told = capfd.readouterr().out
    assert "backbone.residual_proj.bias" in told and "stage.residual.bias" in told and "context 8.19 kB" in told
    file.with_suffix(".json").rename(file.with_name("config.json"))
    convert(file, "hnet", tmp_path / "beside", {})
    save_file({f"module.{name}": weight for name, weight in weights.items()}, file.with_suffix(".safetensors"))
    refused(CheckpointError, file.parent, "has 2 files of weights .hnet.pt, hnet.safetensors.: name the one")
    convert(file.with_suffix(".safetensors"), "hnet", tmp_path / "plain", {"model": {"ratios": [4.0]}})
    assert loaded(tmp_path / "plain").model.config.ratios == (4.0,)
    first, second = (store.read_tensors(store.newest(tmp_path / run), "model") for run in ("beside", "plain"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    file.with_name("config.json").unlink()
    refused(CheckpointError, file, "hnet.pt has neither hnet.json nor config.json beside it: put the one published")


def refused(error: type[BytelmError], source: Path, words: str, **sets: Any) -> None:
    with pytest.raises(error, match=words):
        convert(source, "hnet", source.parent / "never", sets)
    assert not (source.parent / "never").exists()


def test_settings_that_a_trainer_left_on_weights_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The public code reads its checkpoints with OmegaConf's lists allowed; here that library need not exist."""
    module = ModuleType("omegaconf.listconfig")

    class ListConfig:
        def __init__(self) -> None:
            self._content = [0.9, 0.95]

    ListConfig.__module__, ListConfig.__qualname__ = module.__name__, "ListConfig"
    module.ListConfig = ListConfig  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config, weights = SHAPES["one stage"], tensors(SHAPES["one stage"])
    marked = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    for weight in marked.values():
        weight._optim = {"betas": ListConfig()}  # pyright: ignore[reportAttributeAccessIssue]
    file = published(tmp_path, config, dict(marked))
    top = published(tmp_path / "top", config, {**weights, "betas": ListConfig()})  # pyright: ignore[reportArgumentType]
    more = published(tmp_path / "more", config, {**dict(marked), "said": Said()})  # pyright: ignore[reportArgumentType]
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delitem(sys.modules, "omegaconf")
    convert(file, "hnet", tmp_path / "run", {})
    found = store.read_tensors(store.newest(tmp_path / "run"), "model")
    assert torch.equal(found["stage.residual.weight"], weights["backbone.residual_proj.weight"])
    refused(CheckpointError, top, "holds no table of tensors")
    refused(CheckpointError, more, "nothing in it was executed")
    assert not capfd.readouterr().out


class Said:
    """A pickle that, were it trusted, would print."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("said",)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch_layout": ["m4"]}, r"arch_layout = \['m4'\]: write layers around layers"),
        ({"arch_layout": ["m4", "T22", "m4"]}, "write layers around layers"),
        ({"arch_layout": ["m4", ["T22"], 4]}, "write layers around layers"),
        ({"arch_layout": ["m2", ["x2"], "m2"]}, 'layers has "x2": write letters m, M, t, T'),
        ({"arch_layout": ["m2", ["T0"], "m2"]}, 'layers has "T0"'),
        ({"arch_layout": ["m2", ["T999t999"], "m2"]}, "at most 1024 layers in a network"),
        ({"d_model": [32]}, "d_model has 1 values: arch_layout needs 2"),
        ({"d_model": [64, 32]}, "no inner network may be narrower"),
        ({"d_model": [40, 64]}, "heads of 64 do not divide 2 times the width 40"),
        ({"d_intermediate": [0, 0]}, "layers M and T have feed-forward layers, whose width is 0"),
        ({"vocab_size": 512}, "vocab_size = 512 is not supported: bytelm has 256"),
        ({"tie_embeddings": True}, "tie_embeddings = True is not supported"),
        ({"rope_theta": 5}, "rope_theta is not supported: known: arch_layout, "),
        ({"ssm_cfg": {"d_state": 6, "headdim": 32}}, "ssm_cfg: headdim is not supported"),
        ({"attn_cfg": {**HEADS, "rotary_emb_dim": [4, 18]}}, "rotary width 18 must be even, and at most a head's, 16"),
        ({"attn_cfg": {**HEADS, "window_size": [9, -2]}}, r"window_size = \[9, -2\] is not a list of counts from -1"),
        ({"attn_cfg": {"num_heads": [4, 4], "rotary_emb_dim": [4, 6]}}, "attn_cfg: window_size has 0 values"),
    ],
)
def test_options_that_are_not_supported(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = published(tmp_path, {**SHAPES["one stage"], **change}, tensors(SHAPES["one stage"]))
    refused(ConfigError, file, words)


def test_weights_that_differ_are_a_table_under_their_names(tmp_path: Path) -> None:
    weights = tensors(SHAPES["one stage"])
    weights["backbone.extra"] = weights.pop("backbone.residual_proj.bias")
    weights["embeddings.weight"] = torch.zeros(260, 32)
    weights["backbone.main_network.pad_dimension"] = torch.zeros(1, 32)
    file = published(tmp_path, SHAPES["one stage"], weights)
    with pytest.raises(CheckpointError) as told:
        convert(file, "hnet", tmp_path / "run", {})
    for row in (
        "unexpected  backbone.extra",
        "missing     backbone.residual_proj.bias  float32 [32]",
        "shape       embeddings.weight  float32 [260, 32], not float32 [256, 32]",
        "shape       backbone.main_network.pad_dimension  float32 [1, 32], not float32 [32]",
    ):
        assert row in str(told.value)
    weights = tensors(SHAPES["one stage"])
    weights["backbone.encoder.layers.1.mixer.D"][0] = torch.nan
    refused(CheckpointError, published(tmp_path, SHAPES["one stage"], weights), "layers.1.mixer.D")


def test_what_has_no_published_layout_is_not_exported(tmp_path: Path) -> None:
    tiny = Config.tiny()["published"]
    for config, words in (
        (Config.tiny()["one stage"], "an H-Net of attention alone has no published layout"),
        (tiny, "an H-Net with other heads has no published layout"),
        (Config(theta=5.0, published=Published()), "model.theta = 5.0: theirs is 10000"),
        (Config(published=Published(ffn_dims=(0, 200))), "ffn_dims has 200: theirs are multiples of 128"),
        (Config(published=Published(), ngram_sizes=(3,)), "an H-Net with n-grams has no published layout"),
    ):
        with pytest.raises(ConfigError, match=words):
            exchange.options(config)
    model = tiny.build()
    model.init_weights(0)
    with pytest.raises(ConfigError, match="has learned logits of ids that the published layout lacks"):
        exchange.exported(tiny, model.state_dict())
    imported(tmp_path / "at", "one stage")
    with pytest.raises(ConfigError, match="modality: the published layout has none"):
        export(tmp_path / "at" / "run", "hnet", tmp_path / "out", {"modality": {"name": "image", "width": 3}})
    assert not (tmp_path / "out").exists()


def test_layers_of_both_kinds_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match=r"model.layers = 3: model.published says it: leave it out"):
        Config(layers=3, published=Published())
    with pytest.raises(ConfigError, match=r"model.published.layers = \['m4', 'T22'\]: 2 model.dims need 3"):
        Config(published=Published(layers=("m4", "T22")))
    with pytest.raises(ConfigError, match=r"rotary_dims = \[-2, 48\]: each must be at least 0"):
        Config(published=Published(rotary_dims=(-2, 48)))


def test_commands_use_such_a_run_as_any_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = published(tmp_path, SHAPES["two stages"], tensors(SHAPES["two stages"], half=True))
    run, text = str(tmp_path / "run"), tmp_path / "text.txt"
    text.write_bytes(DATA)
    words = ["convert", str(file), run, "--format", "hnet"]
    assert cli([*words, "--check"]) == 2
    assert "--check: the public code of H-Net needs kernels of a GPU: leave --check out" in capfd.readouterr().err
    for words in (["generate", run, "The", "--max-bytes", "5"], ["eval", run, str(text)], ["patches", run, "The fox"]):
        assert cli(words) == 0, words
    assert cli(["compress", run, str(text)]) == 0
    assert cli(["decompress", run, f"{text}.blm", "--out", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back").read_bytes() == DATA
