"""Published BLTs and ours: the same logits, patches and bytes both ways, of every size, within their memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import published
from bytelm import load
from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe, resolve_checkpoint
from bytelm.cli import run as cli
from bytelm.config import to_mapping
from bytelm.data.modalities import image
from bytelm.errors import CheckpointError, ConfigError, MissingExtraError, UsageError
from bytelm.exchange.check import check
from bytelm.exchange.convert import convert, export
from bytelm.models.blt import model as blt
from bytelm.models.blt import names
from bytelm.models.blt.formats import hf
from bytelm.models.transformer import entropy_model as transformer
from bytelm.patching import entropy
from bytelm.units import PAD
from exchanging import download, held, ours, recipe_of, same
from published import SHAPES, TEXTS, Pair, edit, ids, logits, pair, save, transformers

NEAR = 4  # times the noise of float32: what another order of the same sums may come to
DIFFERENT = {name: SHAPES[name] for name in ("k·d = global", "three encoder layers, the last crossed")}


@pytest.fixture(scope="module", params=SHAPES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random model and its conversion, of each shape."""
    return pair(tmp_path_factory.mktemp("pair"), **SHAPES[request.param])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random model and its conversion, of one shape."""
    return pair(tmp_path_factory.mktemp("one"), global_dim=48, functions=2, sizes=(2, 5))


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_the_threshold_cuts_half_and_noise_moves_no_patch(both: Pair) -> None:
    """What the tests of logits stand on."""
    values = published.entropies(both.theirs)
    cut = both.theirs.config.patching_threshold
    assert (values - cut).abs().min() > 1e-4
    assert 0.2 < float((values > cut).float().mean()) < 0.6
    assert 0 < both.noise < 1e-5


def test_entropies_are_those_of_transformers(both: Pair) -> None:
    model = both.lm.model
    assert isinstance(model, blt.BLT) and isinstance(model.patcher, entropy.Entropy)
    entropy_model = model.patcher.entropy_model
    found = torch.cat([entropy_model.entropies(ids([text]), entropy_model.initial_state(1))[0][0] for text in TEXTS])
    assert (found - published.entropies(both.theirs)).abs().max() < 1e-5


def test_logits_are_those_of_transformers(both: Pair) -> None:
    """Hash, pooling, double residual, rotary pairs, windows, patches, the latent a byte reads: all, or they differ."""
    for text in TEXTS:
        assert (ours(both.run, [text]) - logits(both.theirs, ids([text]))).abs().max() < NEAR * both.noise


def test_texts_side_by_side_have_the_logits_of_transformers(both: Pair) -> None:
    """Padding on the right, where both agree at every real position."""
    found = ours(both.run, TEXTS)
    batch = ids(TEXTS)
    wanted = logits(both.theirs, batch, attention_mask=(batch != PAD).long())
    real = batch != PAD
    assert not real.all()
    assert (found - wanted)[real].abs().max() < NEAR * both.noise


def test_transformers_loads_what_is_exported(
    both: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No key is missing or left over, a call without options works, logits and greedy text are ours."""
    export(both.run, "hf", tmp_path / "hf", {})
    transformers.logging.enable_propagation()
    back, told = transformers.BltForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    transformers.logging.disable_propagation()
    assert not any(told.values()), told
    assert not caplog.records and "weights" not in capfd.readouterr().err.replace("Loading weights", "")
    text = TEXTS[0]
    with torch.no_grad():
        plain = back(input_ids=published.theirs(ids([text]))).logits[..., published.THEIRS]
    assert (plain - ours(both.run, [text])).abs().max() < NEAR * both.noise
    back(input_ids=published.theirs(ids([text])), use_cache=True)  # wrong, as it says there, but no crash
    prompt = published.theirs(ids([text[:20]]))
    written = back.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False, suppress_tokens=[0, 1, 2, 3])
    greedy = bytes((written[0, prompt.shape[1] :] - 4).tolist())
    assert greedy == both.lm.generate(text[:20], max_bytes=20, temperature=0.0, eos=False)
    assert len(greedy) == 20


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_saved_model_is_exported_as_its_run_is(one: Pair, tmp_path: Path, layout: Any) -> None:
    one.lm.save_pretrained(tmp_path / "saved")
    homes = [tmp_path / "of a run", tmp_path / "of a folder"]
    for source, home in zip((one.run, tmp_path / "saved"), homes, strict=True):
        export(source, layout, home, {})
    files = [sorted(path.relative_to(home) for path in home.rglob("*")) for home in homes]
    assert files[0] == files[1]
    found = [load_file(home / "model.safetensors") for home in homes]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_the_exported_tokenizer_is_one_of_bytes(one: Pair, tmp_path: Path) -> None:
    export(one.run, "hf", tmp_path / "hf", {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (
        "",
        " a  b\t\r\n",
        "Hé\x00\x7f\u2028 <s></s>".replace("<s></s>", ""),
        "".join(map(chr, range(256))),
        "𐀀日本",
    ):
        encoded = tokenizer(text).input_ids
        assert encoded == [1, *(byte + 4 for byte in text.encode())]
        assert tokenizer.decode(encoded, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_no_text_is_a_special_of_the_exported_tokenizer(one: Pair, tmp_path: Path) -> None:
    export(one.run, "hf", tmp_path / "hf", {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "again")
    for found in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in ("a</s>b", "<s>", "<boe></s> <reserved>", "</s"):
            assert found(text).input_ids == found([text])["input_ids"][0] == [1, *(byte + 4 for byte in text.encode())]
            assert found.decode(found(text).input_ids, skip_special_tokens=True) == text
        assert found(["a</s>", "b"], padding=True)["input_ids"] == [[1, 101, 64, 51, 119, 66], [1, 102, 0, 0, 0, 0]]


def test_the_exported_card_is_right_about_padding(one: Pair, tmp_path: Path) -> None:
    """On the right nothing is wrong but what stands at the padding; on the left all is, without a warning."""
    export(one.run, "hf", tmp_path / "hf", {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    texts = ["The quick brown fox", "a b", "The quick brown fox, jumps over the lazy dog. And again"]
    alone = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    off: dict[str, float] = {}
    for side in ("default", "left"):
        batch = tokenizer(texts, return_tensors="pt", padding=True, **{"padding_side": side} if side == "left" else {})
        with torch.no_grad():
            found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            pairs = [
                (found[row][batch.attention_mask[row] == 1], model(ids).logits[0]) for row, ids in enumerate(alone)
            ]
        off[side] = max(float((one - other).abs().max()) for one, other in pairs)
    assert off["default"] < NEAR * one.noise
    assert off["left"] > 1e-2, "transformers masks padding on the left by now: say so in the card and docs/weights.md"
    card = (tmp_path / "hf" / "README.md").read_text()
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    assert all("Generate from one text at a time" in text and "Padded on the left" in text for text in (card, page))


def test_a_folder_in_pieces_is_the_same_model(one: Pair, tmp_path: Path) -> None:
    folder = save(one.theirs, tmp_path / "hf", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and not (folder / hf.WEIGHTS).exists()
    convert(folder, "hf", tmp_path / "run", {})
    assert same(held(tmp_path / "run"), held(one.run))


# ---- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_there_and_back_is_the_same_bit_for_bit(both: Pair, tmp_path: Path, layout: Any) -> None:
    if layout == "meta" and 37 in recipe_of(both.run)["model"]["ffn_dims"]:
        with pytest.raises(ConfigError):  # Meta's configuration cannot say such widths
            export(both.run, layout, tmp_path / "out", {})
        return
    export(both.run, layout, tmp_path / "out", {})
    convert(tmp_path / "out", layout, tmp_path / "run", {})
    assert same(held(tmp_path / "run"), held(both.run))
    assert recipe_of(tmp_path / "run") == recipe_of(both.run)
    assert (
        resolve_checkpoint(tmp_path / "run")[1]["context"]
        == resolve_checkpoint(both.run)[1]["context"]
        == both.lm.context
    )


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_weights_stay_in_the_precision_that_they_have(one: Pair, tmp_path: Path, layout: Any) -> None:
    """bfloat16 is stored as it is in all four places, and computed in float32 without a loss."""
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(one.folder / hf.WEIGHTS).items()}
    shutil.copytree(one.folder, tmp_path / "hf")
    save_file(narrow, tmp_path / "hf" / hf.WEIGHTS)
    convert(tmp_path / "hf", "hf", tmp_path / "run", {})
    wanted = {name: tensor.bfloat16() for name, tensor in held(one.run).items()}
    assert same(held(tmp_path / "run"), wanted)
    export(tmp_path / "run", layout, tmp_path / "out", {})
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / hf.WEIGHTS).values()} == {torch.bfloat16}
    convert(tmp_path / "out", layout, tmp_path / "again", {})
    assert same(held(tmp_path / "again"), wanted)
    assert same(load(tmp_path / "again").model.state_dict(), {name: tensor.float() for name, tensor in wanted.items()})


def test_float64_is_narrowed_to_what_a_model_computes_in(one: Pair, tmp_path: Path) -> None:
    shutil.copytree(one.folder, tmp_path / "hf")
    save_file(
        {name: tensor.double() for name, tensor in load_file(one.folder / hf.WEIGHTS).items()},
        tmp_path / "hf" / hf.WEIGHTS,
    )
    convert(tmp_path / "hf", "hf", tmp_path / "run", {})
    assert same(load(tmp_path / "run").model.state_dict(), one.lm.model.state_dict())


def test_a_cross_attention_that_counts_is_never_left_out(tmp_path: Path) -> None:
    """Those of earlier layers are overwritten in transformers; one more than the configuration has is a wrong file."""
    model = published.made(encoder_layers=3, all_layers=True)
    save(model, tmp_path / "hf")
    edit(tmp_path / "hf" / hf.CONFIG, lambda config: config["encoder_config"].update(cross_attn_all_layers=False))
    with pytest.raises(CheckpointError, match=r"unexpected  model\.local_encoder\.cross_attn_layers\.2"):
        convert(tmp_path / "hf", "hf", tmp_path / "run", {})


# ---- memory ----------------------------------------------------------------------------------------------------------


MEASURED = """
import re, sys, threading, time
from pathlib import Path
import torch._dynamo  # which torch imports to split a tensor on the meta device
from bytelm import load
from bytelm.exchange.convert import convert, export

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak(job):
    before, most, over = anonymous(), 0, threading.Event()
    def watch():
        nonlocal most
        while not over.is_set():
            most = max(most, anonymous())
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = job()
    over.set()
    watcher.join()
    return max(most, anonymous()) - before

folder, run, out, warm = map(Path, sys.argv[1:])
load(warm)  # what is imported and set up once is no weight
print(peak(lambda: convert(folder, "hf", run, {})))
print(peak(lambda: load(run)))
print(peak(lambda: export(run, "hf", out, {})))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_weights_lie_in_memory_once(one: Pair, tmp_path: Path) -> None:
    """150 MB of them: half in a table, half in matrices that are joined; in conversion no more than some pieces."""
    config = blt.Config(local_dim=128, global_dim=1024, global_layers=1, decoder_layers=1, ngram_rows=22_000, queries=4)
    recipe = Recipe(config, entropy.Config(1.0, max_length=None, max_single_byte_run=None), transformer.Config())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / hf.CONFIG).write_text(json.dumps(hf.config_of(recipe, 64)))
    likes, weights = recipe.build_on_meta().state_dict(), dict[str, Tensor]()
    for match in names.matches(likes, config, "hf"):
        weights |= {name: torch.ones(like.shape) for name, like in match.split(likes[match.ours]).items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    assert 120e6 < size < 160e6
    save_file(weights, tmp_path / "hf" / hf.WEIGHTS)
    folders = [str(tmp_path / name) for name in ("hf", "run", "out")]
    folders.append(str(one.run))
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed is not held
    environment = {**os.environ, **given_back}
    words = [sys.executable, "-c", MEASURED, *folders]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    converting, loading, exporting = (int(peak) / size for peak in done.stdout.split())
    assert converting < 0.3 and loading < 1.3 and exporting < 1.3, (converting, loading, exporting)


# ---- wrapped, looked at, compared ------------------------------------------------------------------------------------


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "a compiled layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "DDP around a compiled one": lambda name: f"module._orig_mod.{name}",
    "a trainer's": lambda name: f"model.{name}",
    "net in module": lambda name: f"module.net.{name}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_of_wrapped_models(one: Pair, hub: Path, tmp_path: Path, how: str) -> None:
    """In transformers' layout, and in Meta's, where the entropy model is a file of its own."""
    copy, folder = Path(shutil.copytree(one.folder, tmp_path / "hf")), download(hub, tmp_path / "meta")
    weights = {WRAPPED[how](name): tensor for name, tensor in load_file(copy / hf.WEIGHTS).items()}
    save_file(weights, copy / hf.WEIGHTS)
    for file in (folder / "consolidated.pth", folder.parent / names.ENTROPY_MODEL / "consolidated.pth"):
        table = torch.load(file)["model"]
        torch.save({"model": {WRAPPED[how](name): tensor for name, tensor in table.items()}}, file)
    convert(copy, "hf", tmp_path / "run-hf", {})
    convert(folder, "meta", tmp_path / "run-meta", {})
    assert same(held(tmp_path / "run-hf"), held(one.run)) and same(held(tmp_path / "run-meta"), held(one.run))


def test_a_tensor_that_is_there_wrapped_and_bare_is_refused(one: Pair, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(one.folder, tmp_path / "hf"))
    weights = load_file(copy / hf.WEIGHTS)
    save_file(weights | {"_orig_mod.lm_head.weight": weights["lm_head.weight"] + 1}, copy / hf.WEIGHTS)
    with pytest.raises(CheckpointError, match="is there twice, in a model and in its wrapper"):
        convert(copy, "hf", tmp_path / "run", {})


def test_a_dry_run_prints_the_table_and_writes_nothing(
    one: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli(["convert", str(one.folder), str(tmp_path / "run"), "--format", "hf", "--dry-run"]) == 0
    out = capfd.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert (
        lines["model.local_decoder.layers.1.mlp.up_proj.weight"][-1]
        == "decoder.stack.blocks.1.feed_forward.gate_up.weight"
    )
    assert lines["lm_head.weight"] == ["float32", "[260,", "16]", "decoder.head.weight"]
    weights = load_file(one.folder / hf.WEIGHTS)
    assert weights.keys() <= lines.keys() and not (tmp_path / "run").exists()
    assert {words[-1] for name, words in lines.items() if name in weights} == held(one.run).keys()
    assert cli(["convert", str(one.folder), str(tmp_path / "run"), "--format", "hf", "--dry-run", "--check"]) == 2
    assert "--check needs a run, and --dry-run writes none" in capfd.readouterr().err


def test_check_compares_the_logits_of_source_and_run(
    one: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["convert", str(one.folder), str(tmp_path / "run"), "--format", "hf", "--check"]
    assert cli(words) == 0
    found = re.search(r"logits:  equal to (\S+) \(of up to (\S+)\), on (\d+) bytes", capfd.readouterr().out)
    assert found and 0 < float(found[1]) < 1e-4 * float(found[2])
    copy = Path(shutil.copytree(one.folder, tmp_path / "hf"))
    weights = load_file(copy / hf.WEIGHTS)
    weights["model.local_decoder.layers.1.mlp.up_proj.weight"][3] *= 1.5
    save_file(weights, copy / hf.WEIGHTS)
    with pytest.raises(CheckpointError, match="the source computes something that bytelm does not"):
        check(copy, "hf", tmp_path / "run")
    with pytest.raises(UsageError, match="--check: Meta's code is not an installable package"):
        check(copy, "meta", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"--check needs transformers.*bytelm\[hf\]"):
        check(copy, "hf", tmp_path / "run")


def test_the_widths_of_an_untouched_configuration_of_transformers(tmp_path: Path) -> None:
    transformers.BltConfig().save_pretrained(tmp_path)
    recipe, _, _ = hf.described(tmp_path)
    assert recipe.model.ffn_dims == (2730, 5632, 2816) and recipe.entropy_model.shape().stack().hidden() == 2048


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_what_bytes_stand_for_is_kept(tmp_path: Path, layout: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """In config.json, under a key of ours that other libraries pass over."""
    cut, asked = (
        entropy.Config(1.0, max_length=None, max_single_byte_run=None),
        transformer.Config(layers=1, dim=16, heads=2),
    )
    recipe = Recipe(blt.Config.tiny()["last layer crossed"], cut, asked, image.Config(8, 4, True))
    model = recipe.build()
    model.init_weights(0)
    state = {"recipe": to_mapping(recipe), "context": 64}
    (tmp_path / "run").mkdir()
    store.save(tmp_path / "run", 1, {"model": model.state_dict()}, state)
    assert cli(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", layout]) == 0
    assert "modality image: kept as bytelm_modality in config.json" in capfd.readouterr().out
    convert(tmp_path / "out", layout, tmp_path / "back", {})
    assert recipe_of(tmp_path / "back")["modality"] == to_mapping(recipe)["modality"]
    assert load(tmp_path / "back").modality is not None
    if layout == "hf":
        transformers.BltForCausalLM.from_pretrained(tmp_path / "out")


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_whole_road_on_the_command_line(one: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    (tmp_path / "text").write_bytes(b"\n".join(TEXTS))

    def said(*words: str) -> str:
        assert cli(words) == 0
        return capfd.readouterr().out

    assert "parameters, context 24.6 kB" in said("convert", str(one.folder), run, "--format", "hf")
    said("generate", run, "The quick", "--max-bytes", "8", "--temperature", "0")
    measured = json.loads(said("eval", run, str(tmp_path / "text"), "--json"))
    assert measured["bytes"] == (tmp_path / "text").stat().st_size and 0 < measured["bits_per_byte"] < 20
    assert "|" in said("patches", run, "The quick brown fox")
    assert out in said("export", run, out, "--to", "meta")
    assert "generate with batch size 1" in said("export", run, f"{out}-hf", "--to", "hf")
    again = str(tmp_path / "again")
    said("convert", out, again, "--format", "meta", "--set", "patching.threshold=1.5")
    assert recipe_of(Path(again))["patching"]["threshold"] == 1.5
    for code, words in (
        (4, ["convert", str(one.folder), run, "--format", "hf"]),
        (4, ["convert", str(tmp_path / "none"), str(tmp_path / "new"), "--format", "hf"]),
        (4, ["export", run, out, "--to", "hf"]),
        (2, ["export", run, str(tmp_path / "new"), "--to", "gguf"]),
        (2, ["export", run, str(tmp_path / "new"), "--to", "hf", "--set", "patching.rule=relative"]),
    ):
        assert cli(words) == code
        error = capfd.readouterr().err
        assert error.startswith("bytelm: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
