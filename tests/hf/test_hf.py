"""bytelm in Hugging Face's transformers: the same logits, bytes and weights, whichever of its tools asks for them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bytelm
from bytelm import BytelmError, configure
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import to_mapping
from bytelm.errors import CheckpointError, ConfigError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.lm import LM
from bytelm.models.transformer import model as transformer
from bytelm.testing import UniformModel, tiny_models
from bytelm.testing.pretend import AWAY, moved, pretend
from bytelm.training.run import train
from bytelm.transfer import to_host
from bytelm.units import BOS, EOS, PAD, RESERVED, VOCAB

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DynamicCache,
        Trainer,
        TrainingArguments,
        pipeline,
    )

    import bytelm.hf

from bytelm.hf import BytelmConfig, BytelmForCausalLM, ByteTokenizer
from bytelm.hf.cache import ByteCache

# peft asks transformers by a name that it has given another.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
TEXTS = ["hello world", "", "the quick (brown) fox, jumps! over 1024 déjà vus"]


def lm_of(model: ByteModel) -> LM:
    """An LM of a model made by hand, its recipe taken from its parts."""
    patcher = model.patcher
    entropy_model = getattr(patcher, "entropy_model", None)
    recipe = Recipe(model.config, patcher and patcher.config, entropy_model and entropy_model.config)
    return LM(model.eval(), 64, None, to_mapping(recipe))


MODELS = {name: lm_of(model) for name, model in tiny_models() if model.tokens is None}
BLT = [name for name in MODELS if "entropy" in name]
SOME = [*BLT[:3], "megabyte (three stages)", "transformer (windowed)", "linear (two heads)", "perceiver (blocks of 5)"]
TOKENIZER = ByteTokenizer()


def saved(name: str, folder: Path) -> str:
    MODELS[name].save_pretrained(folder)
    return str(folder)


def wrapped(name: str) -> BytelmForCausalLM:
    return BytelmForCausalLM.from_lm(MODELS[name])


def copied(name: str, folder: Path) -> Any:
    """A model that a test may train."""
    return AutoModelForCausalLM.from_pretrained(saved(name, folder))


def batch(side: str = "left", texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(TOKENIZER(texts, return_tensors="pt", padding=True, padding_side=side))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def everything(model: ByteModel) -> dict[str, Tensor]:
    """Parameters and buffers, those that no file holds among them."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_own_whatever_is_padded(name: str) -> None:
    ours, hf = MODELS[name].model, wrapped(name)
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = (batch(side)[key] for key in ("input_ids", "attention_mask"))
            logits = hf(ids.masked_fill(mask == 0, ord("?")), mask).logits
            assert torch.equal(logits[mask == 1], ours(ids)[0][mask == 1])
            for row, text in enumerate(TEXTS):
                alone, _ = ours(torch.tensor([TOKENIZER.from_bytes(text.encode())]))
                torch.testing.assert_close(logits[row][mask[row] == 1], alone[0], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(logits[row, -1], alone[0, -1], atol=2e-5, rtol=1e-4)
            assert hf(ids, mask, logits_to_keep=1).logits.shape == (3, 1, VOCAB)
            (as_tuple,) = hf(ids, mask, return_dict=False)
            assert torch.equal(as_tuple[mask == 1], logits[mask == 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_what_bytelm_trains_on(side: str) -> None:
    name = BLT[0]
    ids, mask = batch(side)["input_ids"], batch(side)["attention_mask"]
    ids = torch.cat([ids, torch.tensor([[EOS, BOS, 65]] * 3)], 1)
    mask = torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], 1)
    ids[0, ids.shape[1] // 2], mask[0, ids.shape[1] // 2] = 66, 1
    nats, _ = score(MODELS[name].model, ids)
    # The first id of a row has nothing before it: here the 66 that stands among the PADs on the left.
    counted = sum(int((row[row != PAD][1:] != BOS).sum()) for row in ids)
    hf = wrapped(name)
    labels = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)([{"input_ids": row} for row in ids])["labels"]
    assert (labels == -100).any()
    for given_labels in (labels, ids):
        loss = hf(ids, mask, labels=given_labels).loss
        torch.testing.assert_close(loss, nats / counted)
    torch.testing.assert_close(hf(ids, mask, labels=ids, num_items_in_batch=7).loss, nats / 7)
    fewer = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100, ids)
    last = hf(ids[:, :-1], mask[:, :-1]).logits[:, -1].log_softmax(-1)[:, 65]
    torch.testing.assert_close(hf(ids, mask, labels=fewer).loss, -last.mean())


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_on_a_device_logits_and_loss_are_the_same(name: str) -> None:
    """Ids, mask and labels come from there, as a trainer moves them."""
    model = wrapped(name).eval()
    batch = TOKENIZER(TEXTS, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"]
    wanted = model(**batch)
    cached = model(**{key: x for key, x in batch.items() if key != "labels"}, use_cache=True)
    with pretend():
        far, there = moved(model), {key: x.to(AWAY) for key, x in batch.items()}
        found = far(**there)
        assert found.logits.device == AWAY
        assert float(to_host(found.loss)) == pytest.approx(float(wanted.loss), rel=1e-5)
        del there["labels"]
        logits = to_host(far(**there, use_cache=True).logits)
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(logits[real], cached.logits[real], rtol=1e-4, atol=1e-4)


def test_a_row_without_bos_learns_nothing_from_the_pads_before_it() -> None:
    hf = wrapped(BLT[0])
    ids = torch.tensor([[PAD, PAD, 65, 66], [65, 66, PAD, PAD]])
    one, other = (hf(row[None], labels=row[None]).loss for row in ids)
    torch.testing.assert_close(one, other)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    hf = copied(BLT[0], tmp_path).train()
    ids = batch()["input_ids"]
    found: list[Tensor] = []
    for _ in range(2):
        hf.zero_grad()
        hf(ids, labels=ids).loss.backward()
        found.append(hf.model.latent.blocks[0].attention.qkv.weight.grad.clone())
        hf.activation_checkpointing_enable()
        assert hf.model.latent.recompute and hf.is_activation_checkpointing
    torch.testing.assert_close(*found)
    assert hf.get_input_embeddings() is hf.model.encoder.embed.byte
    hf.activation_checkpointing_disable()
    assert not hf.model.latent.recompute and not hf.is_activation_checkpointing


# --- generating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_greedy_bytes_are_bytelms_own_with_a_cache_and_without(name: str) -> None:
    hf, ours = wrapped(name), MODELS[name].generate([text.encode() for text in TEXTS], max_bytes=14, temperature=0)
    for side in ("left", "right"):
        given_ids = batch(side)
        start = given_ids["input_ids"].shape[1]
        for cached in (True, False):
            ids = hf.generate(**given_ids, max_new_tokens=14, use_cache=cached)
            assert [TOKENIZER.to_bytes(row[start:]) for row in ids] == ours


@pytest.mark.parametrize("name", SOME[::3])
def test_beam_search_is_the_same_with_a_cache_and_without(name: str) -> None:
    hf = wrapped(name)
    options = {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(*(hf.generate(**batch(), **options, use_cache=cached) for cached in (True, False)))


def test_sampling_goes_on_from_a_cache_that_was_kept() -> None:
    hf = wrapped("linear (two heads)")  # which no kernel reads: its state goes on
    whole = hf.generate(**batch(), max_new_tokens=12)
    first = hf.generate(**batch(), max_new_tokens=5, return_dict_in_generate=True)
    mask = torch.cat([batch()["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    seen: list[int] = []
    hook = hf.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    rest = hf.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=7)
    hook.remove()
    assert torch.equal(rest, whole) and set(seen) == {1}
    hf.generate(**batch(), max_new_tokens=3, do_sample=True, num_return_sequences=2)


def test_a_cache_with_gradients_goes_on_from_a_state() -> None:
    hf, ids = wrapped(BLT[0]), batch()["input_ids"]
    assert hf(ids).past_key_values is None
    cache = hf(ids, use_cache=True).past_key_values
    assert isinstance(cache, ByteCache) and cache.get_seq_length() == ids.shape[1]
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    more = torch.full((3, 1), ord("x"))
    now = hf(more, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(now, hf(torch.cat([ids[rows], more], 1)).logits[:, -1], atol=1e-5, rtol=1e-4)
    assert cache.batch_size == 3
    cache.batch_repeat_interleave(2)
    twice = hf(more.repeat(2, 1), past_key_values=cache).logits[:, -1]
    assert cache.batch_size == 6 and torch.equal(twice[::2], twice[1::2])
    cache.batch_select_indices(rows[1:])
    assert cache.batch_size == 2 and hf(more[:2], past_key_values=cache).logits.shape == (2, 1, VOCAB)
    cache.reset()
    assert torch.equal(hf(ids, past_key_values=cache).logits, hf(ids, use_cache=True).logits)
    with pytest.raises(UsageError, match="a DynamicCache is not a ByteCache"):
        hf(ids, past_key_values=DynamicCache())
    with pytest.raises(UsageError, match=r"crop\(1\): give the number of positions to forget as a negative one"):
        cache.crop(1)
    cache.crop(-2)
    cut = hf(more, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(cut, hf(torch.cat([ids[:, :-2], more], 1)).logits[:, -1], atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="attention_mask has 4 axes"):
        hf(ids, ids[:, None, None])


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_changes_no_bit(name: str, tmp_path: Path) -> None:
    ours = MODELS[name].model
    hf = AutoModelForCausalLM.from_pretrained(saved(name, tmp_path / "one"))
    assert type(hf) is BytelmForCausalLM and not hf.training
    assert same(everything(hf.model), everything(ours))
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in hf.model.named_parameters() if not parameter.requires_grad} == frozen
    hf.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    for folder in ("one", "two"):
        back = bytelm.load(tmp_path / folder)
        assert same(everything(back.model), everything(ours))
        assert (back.recipe, back.context, back.modality) == (MODELS[name].recipe, 64, None)
    with torch.no_grad():
        assert torch.equal(hf(batch()["input_ids"]).logits, wrapped(name)(batch()["input_ids"]).logits)


def test_a_folder_is_the_same_whoever_wrote_it(tmp_path: Path) -> None:
    saved(BLT[0], tmp_path / "ours")
    wrapped(BLT[0]).save_pretrained(tmp_path / "theirs")
    TOKENIZER.save_pretrained(tmp_path / "theirs")
    ours, theirs = ({path.name for path in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    assert ours == theirs == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"
    }  # fmt: skip
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        one, other = (json.loads((tmp_path / who / name).read_text()) for who in ("ours", "theirs"))
        assert {key: other[key] for key in one} == one
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(config, BytelmConfig) and config.recipe == MODELS[BLT[0]].recipe and config.context == 64
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "ours"), ByteTokenizer)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert card == (tmp_path / "theirs" / "README.md").read_text()
    assert "entropy, cut by transformer entropies" in card and "64 B" in card and "bits per byte" not in card


def test_an_lm_of_a_wrapped_model_is_that_model(tmp_path: Path) -> None:
    hf = wrapped(BLT[0])
    assert not hf.training and hf.lm().model is MODELS[BLT[0]].model
    hf.lm().save_pretrained(tmp_path)
    assert same(everything(bytelm.load(tmp_path).model), everything(MODELS[BLT[0]].model))


def test_random_weights_are_those_of_the_recipe() -> None:
    config = BytelmConfig(recipe=to_mapping(Recipe(transformer.Config.tiny()["full"])), context=8)
    fresh = AutoModelForCausalLM.from_config(config)
    wanted = transformer.Config.tiny()["full"].build()
    wanted.init_weights(0)
    assert same(fresh.model.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("name", BLT[:3])
@pytest.mark.parametrize("how", ["dtype", "to"])
def test_bfloat16_moves_no_boundary(name: str, how: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "one")
    asked = torch.bfloat16 if how == "dtype" else torch.float32
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=asked).to(torch.bfloat16)
    ours, patcher = MODELS[name].model.patcher, hf.model.patcher
    assert ours is not None and patcher is not None
    assert same(patcher.state_dict(), ours.state_dict()) and hf.model.decoder.head.weight.dtype == torch.bfloat16
    ids = torch.randint(256, (4, 200), generator=torch.Generator().manual_seed(0))
    assert torch.equal(patcher.extend(ids)[0], ours.extend(ids)[0])
    assert hf.generate(**batch(), max_new_tokens=3).shape[0] == 3
    hf.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert again.dtype == torch.bfloat16 and same(again.state_dict(), hf.state_dict())
    assert bytelm.load(tmp_path / "two").model.decoder.head.weight.dtype == torch.float32


def spoilt(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if how == "foreign":
        config["model_type"] = "gpt2"
    if how == "bare":
        del config["recipe"]
    if how == "impossible":
        config["recipe"]["model"]["local_dim"] = 15
    if how == "widened":
        config["recipe"]["model"]["ngram_rows"] = 102
    if how == "deeper":
        config["recipe"]["model"]["decoder_layers"] = 3
    if how == "shallower":
        config["recipe"]["model"]["decoder_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    if how == "broken":
        (folder / "config.json").write_text("{")
    if how == "list":
        (folder / "config.json").write_text("[]")
    if how == "weightless":
        (folder / "model.safetensors").unlink()
    if how == "torn":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    if how in ("unnamed", "elsewhere"):
        (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
        pieces = {"unnamed": [], "elsewhere": {"x": "../other.safetensors"}}[how]
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": pieces}))


FAULTS = {
    "foreign": "'gpt2'",
    "bare": "lacks the recipe",
    "impossible": "local_dim|width 15",
    "widened": "shape .*ngram",
    "deeper": "missing .*blocks.2",
    "shallower": "unexpected .*blocks.1",
    "broken": "config.json cannot be read",
    "list": "holds no JSON object",
    "weightless": "has no model.safetensors",
    "torn": "model.safetensors cannot be read",
    "unnamed": "names no files of weights",
    "elsewhere": "has no other.safetensors",
}


@pytest.mark.fault("K1")
@pytest.mark.parametrize("how", FAULTS)
def test_a_folder_that_is_not_whole_is_refused(how: str, tmp_path: Path) -> None:
    saved(BLT[0], tmp_path := tmp_path / "folder")
    spoilt(tmp_path, how)
    with pytest.raises(BytelmError, match=FAULTS[how]):
        bytelm.load(tmp_path)
    if how in ("deeper", "shallower"):  # transformers would say so in its log, and make up what is missing
        with pytest.raises(CheckpointError, match=r"\d+ (missing|unexpected), such as model.decoder"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    elif how in ("bare", "impossible"):
        with pytest.raises(ConfigError, match="recipe"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    tokens = LM(transformer.Config.tiny()["tokens"].build(), 8, None, {"model": {"name": "transformer"}})
    with pytest.raises(UsageError, match="reads 300 tokens"):
        tokens.save_pretrained(tmp_path)
    recipe = to_mapping(Recipe(transformer.Config.tiny()["tokens"]))
    with pytest.raises(UsageError, match="reads 300 tokens"):
        BytelmForCausalLM(BytelmConfig(recipe=recipe))
    for unknown in (LM(UniformModel(), 8), MODELS["transformer (windowed)"].reading("sliding")):
        with pytest.raises(UsageError, match="this LM has no recipe"):
            unknown.save_pretrained(tmp_path)
        with pytest.raises(UsageError, match="this LM has no recipe"):
            BytelmForCausalLM.from_lm(unknown)
    (tmp_path / "file").write_text("")
    with pytest.raises(BytelmError, match="cannot write a model of"):
        MODELS[BLT[0]].save_pretrained(tmp_path / "file")


def test_push_to_hub_sends_the_folder_with_our_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    sent: list[dict[str, bytes]] = []
    written: list[str] = []

    def commit(self: Any, repo_id: str, operations: list[Any], **_: Any) -> None:
        assert repo_id == "me/demo"
        sent.append({operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations})

    def card(repo_id: str, **_: Any) -> Any:
        if not written:
            raise EntryNotFoundError("no card")
        return huggingface_hub.ModelCard(written[0])

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: huggingface_hub.RepoUrl("me/demo"))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", card)
    hf = wrapped(BLT[0])
    hf.push_to_hub("me/demo")
    assert set(sent[0]) == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert b"byte-level language model (blt)" in sent[0]["README.md"]
    written.append("---\ntags: []\n---\nmine\n")
    hf.push_to_hub("me/demo")
    assert b"mine" in sent[1]["README.md"] and b"byte-level" not in sent[1]["README.md"]


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@given(st.text())
def test_a_text_comes_back_as_it_was(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == [BOS, *text.encode()] == TOKENIZER.from_bytes(text.encode())
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids[1:]) == text
    assert TOKENIZER.decode(ids) == f"<bos>{text}"
    tokens = TOKENIZER.tokenize(text)
    assert TOKENIZER.convert_tokens_to_ids(tokens) == ids[1:] and TOKENIZER.convert_tokens_to_string(tokens) == text


@given(st.binary())
def test_bytes_come_back_as_they_were(data: bytes) -> None:
    ids = TOKENIZER.from_bytes(data)
    assert TOKENIZER.to_bytes(ids) == TOKENIZER.to_bytes(torch.tensor(ids)) == data
    assert TOKENIZER.encode(data.decode(errors="surrogateescape")) == ids
    TOKENIZER.decode(ids).encode()  # can be printed


def test_no_text_is_a_special_id(tmp_path: Path) -> None:
    for tokenizer in (TOKENIZER, AutoTokenizer.from_pretrained(saved(BLT[0], tmp_path))):
        text = "<bos><pad> <eos>"
        assert tokenizer.encode(text) == [BOS, *text.encode()]
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
        tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert isinstance(again, ByteTokenizer) and again.encode(text) == [BOS, *text.encode()]
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (PAD, BOS, EOS)
    assert again.convert_ids_to_tokens([65, BOS]) == ["A", "<bos>"] and len(again) == again.vocab_size == VOCAB
    assert again.encode("é", add_special_tokens=False) == [*"é".encode()]
    with pytest.raises(UsageError, match="is not text"):
        TOKENIZER.encode("a\ud800")


def test_shorter_rows_are_padded_on_the_left() -> None:
    found = TOKENIZER(["ab", "c"], padding=True, return_tensors="pt")
    assert found["input_ids"].tolist() == [[BOS, 97, 98], [PAD, BOS, 99]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert TOKENIZER.batch_decode(found["input_ids"], skip_special_tokens=True) == ["ab", "c"]
    assert TOKENIZER.batch_decode(found["input_ids"]) == ["<bos>ab", "<pad><bos>c"]
    assert TOKENIZER("abcd", truncation=True, max_length=3)["input_ids"] == [BOS, 97, 98]


def test_specials_are_shown_until_they_are_skipped() -> None:
    """By their names, so that whoever looks for one in a text, or for none, does not find it everywhere."""
    ids = [PAD, BOS, *"é".encode(), EOS]
    assert TOKENIZER.decode(ids) == TOKENIZER.batch_decode([ids])[0] == "<pad><bos>é<eos>"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "é"
    for name, symbol in (("<pad>", PAD), ("<bos>", BOS), ("<eos>", EOS), ("<reserved>", RESERVED)):
        assert TOKENIZER.decode(symbol) == name and TOKENIZER.decode(symbol, skip_special_tokens=True) == ""
    assert TOKENIZER.decode([0xC3, BOS, 0xA9]) == "\ufffd<bos>\ufffd"


def test_ids_and_tokens_that_there_are_not() -> None:
    assert TOKENIZER.convert_tokens_to_ids("<|im_end|>") is None  # as tools ask whether it exists
    for ids in ([-100, 104], [300], 260):
        for skip in (False, True):
            with pytest.raises(UsageError, match=r"is not an id \(0 to 259\)"):
                TOKENIZER.decode(ids, skip_special_tokens=skip)
    for add in (
        lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
        lambda tokenizer: tokenizer.add_tokens(["<|user|>"]),
    ):
        with pytest.raises(UsageError, match="cannot be added: a byte-level model has exactly 260 ids"):
            add(ByteTokenizer())
    assert ByteTokenizer().add_special_tokens({"pad_token": "<eos>"}) == 0  # as fine-tuning scripts do


STOPS = [
    (["é"], "l'été", "l'é"),
    (["。"], "はい。いいえ。", "はい。"),
    (["é."], "née. été.", "née. été."),
    (["。", "\n\n"], "a\n\nb。", "a\n\n"),
    (["。", "\n\n"], "a\nb。\n\n", "a\nb。"),
    (["\u3002b"], "。a。b", "。a。b"),
    (["ö", "é"], "für Café", "für Café"),
    (["\xff"], "þ÷", "þ÷"),
    (["<eos"], "<eo<eos>", "<eo<eos"),
]


@pytest.mark.parametrize(("stops", "text", "wanted"), STOPS)
def test_stop_strings_are_met_at_their_last_byte(stops: list[str], text: str, wanted: str) -> None:
    script = torch.tensor([BOS, *text.encode(), EOS])

    def written(read: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, script[read.shape[1]], 1e9)

    ids = wrapped("transformer (full)").generate(
        torch.tensor([[BOS]]), max_new_tokens=40, stop_strings=stops, tokenizer=TOKENIZER, logits_processor=[written]
    )
    assert TOKENIZER.decode(ids[0], skip_special_tokens=True) == wanted


def test_the_backend_says_how_bytes_become_text() -> None:
    backend, text = TOKENIZER.backend_tokenizer, "l'été\n\t。\x00"
    assert backend.encode(text).ids == [*text.encode()]
    assert backend.decoder.decode(TOKENIZER.tokenize(text)) == text
    assert TOKENIZER.convert_ids_to_tokens(range(VOCAB)) == [backend.id_to_token(symbol) for symbol in range(VOCAB)]


# --- their tools ------------------------------------------------------------------------------------------------------

DATA = b"def main():\n    return 0\n\n" * 12


def learn(model: Any, folder: Path, **options: Any) -> list[float]:
    """Losses of a Trainer on a few hundred bytes."""
    rows = [{"input_ids": TOKENIZER.from_bytes(DATA[start : start + 40])} for start in range(0, len(DATA), 40)]
    arguments = TrainingArguments(
        str(folder), max_steps=16, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    )
    trainer.train()
    with torch.no_grad():
        nats, count = score(unwrapped(model).model, trainer.data_collator(rows[:3])["input_ids"])
    assert trainer.evaluate(rows[:3])["eval_loss"] == pytest.approx(float(nats / count))
    trainer.save_model(str(folder / "saved"))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def unwrapped(model: Any) -> BytelmForCausalLM:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def falls(losses: list[float], to: float) -> bool:
    return sum(losses[-3:]) < to * sum(losses[:3])


@pytest.mark.parametrize("name", [BLT[0], "megabyte (two stages)"])
def test_a_pipeline_writes_what_lm_writes(name: str, tmp_path: Path) -> None:
    write = pipeline("text-generation", saved(name, tmp_path), device="cpu")
    found = write([TEXTS[0], TEXTS[2]], max_new_tokens=15, do_sample=False, batch_size=2)
    ours = MODELS[name].generate([text.encode() for text in (TEXTS[0], TEXTS[2])], max_bytes=15, temperature=0)
    prompts = (TEXTS[0], TEXTS[2])
    assert [row[0]["generated_text"] for row in found] == [
        text + data.decode(errors="replace") for text, data in zip(prompts, ours, strict=True)
    ]


@pytest.mark.parametrize("name", [BLT[0], BLT[2], "megabyte (two stages)"])
def test_trainer_fine_tunes(name: str, tmp_path: Path) -> None:
    hf = copied(name, tmp_path / "one")
    before = MODELS[name].bits(DATA)[0]
    assert falls(learn(hf, tmp_path / "run", **{"activation_checkpointing": True} if name == BLT[2] else {}), to=0.75)
    after = bytelm.load(tmp_path / "run" / "saved")
    assert after.bits(DATA)[0] < 0.75 * before
    ours, theirs = MODELS[name].model.patcher, after.model.patcher
    assert ours is None or (theirs is not None and same(ours.state_dict(), theirs.state_dict()))


def test_plain_torch_fine_tunes(tmp_path: Path) -> None:
    hf = copied(BLT[0], tmp_path).train()
    before = {name: tensor.clone() for name, tensor in hf.model.patcher.state_dict().items()}
    optimizer = torch.optim.AdamW(hf.parameters(), 1e-2)
    ids = torch.tensor([TOKENIZER.from_bytes(DATA[:60])])
    losses: list[float] = []
    for _ in range(12):
        loss = hf(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert falls(losses, to=0.75) and same(before, hf.model.patcher.state_dict())


@pytest.mark.parametrize("name", [BLT[0], "megabyte (two stages)"])
def test_peft_adapts(name: str, tmp_path: Path) -> None:
    base = copied(name, tmp_path / "base")
    kept = r".*\.patcher\..*" if name in BLT else None
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", exclude_modules=kept)
    adapted = get_peft_model(base, lora)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and ".patcher." not in name for name in trained)
    assert falls(learn(adapted, tmp_path / "run"), to=0.95)
    adapted.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    back = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    with torch.no_grad():
        wanted = adapted.eval()(**batch()).logits
        torch.testing.assert_close(back(**batch()).logits, wanted)
        assert not torch.allclose(wanted, wrapped(name)(**batch()).logits)
    ids = back.generate(**batch(), max_new_tokens=10)
    merged = back.merge_and_unload()
    ours = merged.lm().generate([text.encode() for text in TEXTS], max_bytes=10, temperature=0)
    assert [TOKENIZER.to_bytes(row[batch()["input_ids"].shape[1] :]) for row in ids] == ours
    merged.save_pretrained(tmp_path / "merged")
    assert same(bytelm.load(tmp_path / "merged").model.state_dict(), merged.model.state_dict())


# --- a run, and the page ----------------------------------------------------------------------------------------------

NANO = [
    "model.local_dim=16",
    "model.local_heads=2",
    "model.cross_heads=2",
    "model.attention_window=16",
    "model.global_dim=32",
]
NANO += ["model.global_heads=2", "model.global_layers=1", "model.ngram_rows=101", "model.ffn_multiple=16"]
NANO += [
    "entropy_model.rows=512",
    "train.context_length=64",
    "train.batch=2",
    "train.sample_bytes=0",
    "train.precision=float32",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and with notes."""
    home = tmp_path_factory.mktemp("home")
    (home / "notes.txt").write_text("".join(f"# Monday {number}\nbytes, or {number**3}?\n" for number in range(40)))
    (home / "notes").mkdir()
    for number in range(30):
        (home / "notes" / f"{number}.txt").write_bytes(DATA + bytes(str(number**9), "ascii"))
    train([home / "notes"], configure("blt-tiny", sets=NANO, steps=3), home / "runs" / "demo", quiet=True)
    return home


def test_a_card_has_what_the_run_measured(home: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (home / "runs/demo/metrics.jsonl").read_text().splitlines()]
    bits = [line["bits_per_byte"] for line in lines if line["kind"] == "validation"][-1]
    lm = bytelm.load(home / "runs/demo")
    assert lm.bits_per_byte == bits
    lm.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"| Held-out bits per byte | {bits:.3f} |" in card and "entropy, cut by ngram entropies" in card
    back = bytelm.load(tmp_path)
    assert back.bits_per_byte is None and back.bits(DATA) == lm.bits(DATA)
    # Whoever fine-tunes in the folder measures anew; a card that someone wrote stays.
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    assert "Held-out" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "mine")
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card + "mine"
    # What is saved into a run is not the run.
    lm.save_pretrained(home / "runs/demo")
    (home / "runs/demo/model.safetensors").unlink()
    assert bytelm.load(home / "runs/demo").bits_per_byte == bits


def test_the_code_of_the_page_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 10 and PAGE.read_text().count("```") == 2 * len(blocks)
    pushed: list[tuple[str, str]] = []
    for part in (BytelmForCausalLM, ByteTokenizer):
        monkeypatch.setattr(part, "push_to_hub", lambda self, repo: pushed.append((type(self).__name__, repo)))
    monkeypatch.chdir(home)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pin_memory.*", UserWarning)  # Trainer asks for it where there is no GPU
        for block in blocks:
            exec(block, names)
    assert pushed == [("BytelmForCausalLM", "me/notes"), ("ByteTokenizer", "me/notes")]


# --- without transformers ---------------------------------------------------------------------------------------------


def ran(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_extra_is_named(package: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from bytelm.errors import MissingExtraError
try:
    import bytelm.hf
except MissingExtraError as error:
    print(error)
"""
    assert f"bytelm.hf needs {package}, which is not installed: pip install 'bytelm[hf]'" in ran(code)


def test_folders_need_no_transformers(tmp_path: Path) -> None:
    saved(BLT[0], tmp_path / "one")
    code = f"""
import sys
sys.modules["transformers"] = sys.modules["huggingface_hub"] = None
import bytelm
lm = bytelm.load({str(tmp_path / "one")!r})
lm.save_pretrained({str(tmp_path / "two")!r})
print(bytelm.load({str(tmp_path / "two")!r}).bits(b"abc"))
"""
    assert ran(code) == f"{MODELS[BLT[0]].bits(b'abc')}\n"
