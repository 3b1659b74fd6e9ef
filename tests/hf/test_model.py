"""bytelm in Hugging Face's transformers: the same logits, bytes and weights, in folders that either may write."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bytelm
from bytelm import BytelmError
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import to_mapping
from bytelm.errors import CheckpointError, ConfigError, UsageError
from bytelm.interfaces.objective import score
from bytelm.lm import LM
from bytelm.models.transformer import model as transformer
from bytelm.testing import UniformModel
from bytelm.testing.pretend import AWAY, moved, pretend
from bytelm.transfer import to_host
from bytelm.units import BOS, EOS, PAD, VOCAB

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DynamicCache,
    )

    import bytelm.hf

from bytelm.hf import BytelmConfig, BytelmForCausalLM, ByteTokenizer
from bytelm.hf.cache import ByteCache
from hf_models import BLT, MODELS, SOME, TEXTS, TOKENIZER, batch, copied, everything, same, saved, wrapped

# peft asks transformers by a name that it has given another.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


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
    for unknown in (LM(UniformModel(), 8), MODELS["transformer (windowed)"].with_windowing("sliding")):
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
