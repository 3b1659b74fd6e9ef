"""transformers' `generate` over the decoder: the same bytes as `LM.generate`, and never anything the model is not."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.generation import logits_process, stopping_criteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import to_mapping
from bytelm.decoding import open_decoder, why_plain
from bytelm.errors import ResourceError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.lm import LM
from bytelm.testing import tiny_models
from bytelm.testing.exact import exact
from bytelm.units import BOS, BYTES, EOS, PAD, VOCAB

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from peft import LoraConfig, get_peft_model

    from bytelm.hf import BytelmForCausalLM, ByteTokenizer, loop
    from bytelm.hf.cache import ByteCache

TOKENIZER = ByteTokenizer()
TEXTS = ["hello world", "", "the quick (brown) fox, jumps! over 1024 déjà vus"]
PROMPTS = [text.encode() for text in TEXTS]


def lm_of(model: ByteModel) -> LM:
    """An LM of a model made by hand, its recipe taken from its parts."""
    patcher = model.patcher
    entropy_model = getattr(patcher, "entropy_model", None)
    recipe = Recipe(model.config, patcher and patcher.config, entropy_model and entropy_model.config)
    return LM(model.eval(), 64, None, to_mapping(recipe))


MODELS = {name: lm_of(model) for name, model in tiny_models() if model.tokens is None}
FAST = [name for name, lm in MODELS.items() if not why_plain(lm.model)]
PLAIN = "linear (two heads)"
pytestmark = [
    pytest.mark.skipif(not FAST, reason="no kernels here: there is no C++ compiler"),
    # peft asks transformers by a name that it has given another.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
BLT = next((name for name in FAST if "entropy" in name), PLAIN)
KINDS = [BLT, "megabyte (two stages)", "perceiver (blocks of 5)", "transformer (windowed)"]


def wrapped(name: str = BLT) -> BytelmForCausalLM:
    """A model of its own, whose weights a test may change."""
    return copy.deepcopy(BytelmForCausalLM.from_lm(MODELS[name]))


def batch(texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(TOKENIZER(texts, return_tensors="pt", padding=True))


def one(text: str = "abcabcabcabc") -> dict[str, Tensor]:
    return batch([text])


def written(hf: Any, **options: Any) -> Tensor:
    return hf.generate(**{**batch(), "max_new_tokens": 12, **options})


@contextmanager
def forwards(hf: BytelmForCausalLM) -> Iterator[list[int]]:
    """The widths of what the model's own forward pass reads meanwhile. No hook: a hook would be called by no kernel."""
    seen: list[int] = []
    kind = type(hf.model)
    whole = kind.forward

    def noted(self: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(ids.shape[1])
        return whole(self, ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", noted)
        yield seen


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_greedy_bytes_are_those_of_lm_and_come_from_the_decoder(name: str) -> None:
    hf = wrapped(name)
    with forwards(hf) as seen:
        ids = written(hf, max_new_tokens=90)
        assert not seen
    ours = MODELS[name].generate(PROMPTS, max_bytes=90, temperature=0)
    assert [TOKENIZER.to_bytes(row[-90:]) for row in ids] == ours
    assert torch.equal(ids, written(hf, max_new_tokens=90, use_cache=False))


def test_a_model_without_kernels_reads_with_its_state() -> None:
    hf = wrapped(PLAIN)
    with forwards(hf) as seen:
        written(hf, max_new_tokens=5)
    assert seen == [batch()["input_ids"].shape[1], 1, 1, 1, 1]
    with pytest.raises(ValueError, match="stateful"):
        hf.generate(**one(), assistant_model=wrapped(), max_new_tokens=3)


def ending_early(ids: Tensor, scores: Tensor) -> Tensor:
    """The first row ends with its fifth byte."""
    if ids.shape[1] == batch()["input_ids"].shape[1] + 4:
        scores = scores.clone()
        scores[0] = -1e9
        scores[0, EOS] = 0
    return scores


OPTIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 40},
    "long beams": {"num_beams": 2, "max_new_tokens": 75, "length_penalty": 2.0},
    "a row ends": {"logits_processor": [ending_early]},
    "padded with EOS": {"logits_processor": [ending_early], "pad_token_id": EOS},
    "sampled": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "temperature": 1.3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "processed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 10, "bad_words_ids": [[10]]},
    "many ends": {"eos_token_id": [EOS, *range(100)], "max_new_tokens": 60},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_generate_give_the_same_with_a_cache_and_without(options: dict[str, Any]) -> None:
    hf, found = wrapped(), list[Tensor]()
    for cached in (True, False):
        torch.manual_seed(0)
        found.append(written(hf, use_cache=cached, **options))
    assert torch.equal(*found)


def test_scores_and_logits_are_those_of_the_forward_pass() -> None:
    hf, asked = wrapped(), {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    fast, slow = (written(hf, use_cache=cached, **asked) for cached in (True, False))
    for kind in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(fast[kind]), torch.stack(slow[kind]), atol=2e-5, rtol=1e-4)
    assert torch.isneginf(fast.scores[0][:, [PAD, BOS]]).all() and fast.logits[0].isfinite().all()


@pytest.mark.parametrize("how", ["looked up in the prompt", "an assistant", "itself"])
def test_assisted_generation_writes_the_same(how: str) -> None:
    hf = wrapped()
    helper = {"an assistant": wrapped("transformer (full)"), "itself": hf}.get(how)
    options = {"assistant_model": helper} if helper else {"prompt_lookup_num_tokens": 5}
    with forwards(hf) as seen:
        assert torch.equal(hf.generate(**one(), **options, max_new_tokens=40), hf.generate(**one(), max_new_tokens=40))
        assert not seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_write_what_lm_writes(dtype: torch.dtype) -> None:
    hf = wrapped().to(dtype)
    ours = hf.lm().generate(PROMPTS, max_bytes=12, temperature=0)
    assert [TOKENIZER.to_bytes(row[-12:]) for row in written(hf)] == ours


@pytest.mark.parametrize("ids", [[[65]], [[BOS]], [[65, BOS, 66, 67]], [[PAD, 65, PAD, 66]]])
def test_prompts_of_few_ids_and_of_odd_ones(ids: list[list[int]]) -> None:
    hf, prompt = wrapped(), torch.tensor(ids)
    found = [hf.generate(prompt, max_new_tokens=9, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


def test_a_prompt_of_no_ids_is_refused_and_none_is_a_bos() -> None:
    hf = wrapped()
    assert hf.generate(max_new_tokens=5)[0].tolist() == [BOS, *MODELS[BLT].generate(b"", max_bytes=5, temperature=0)]
    with pytest.raises(UsageError, match="a prompt of 0 ids: start it with BOS"):
        hf.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)
    with pytest.raises(ValueError, match="greater than 0"):
        hf.generate(**one(), max_new_tokens=0)


def test_threads_write_what_each_writes_alone() -> None:
    hf, found = wrapped(), dict[int, bytes]()

    def write(byte: int) -> None:
        prompt = torch.tensor([[BOS, byte, byte]])
        found[byte] = TOKENIZER.to_bytes(hf.generate(prompt, max_new_tokens=40)[0, 3:])

    thread_pool = [threading.Thread(target=write, args=(byte,)) for byte in range(65, 70)]
    for thread in thread_pool:
        thread.start()
    for thread in thread_pool:
        thread.join()
    assert found == {b: MODELS[BLT].generate(bytes([b, b]), max_bytes=40, temperature=0) for b in range(65, 70)}


# --- the cache --------------------------------------------------------------------------------------------------------


def odd_rows(rng: random.Random, rows: int, width: int) -> Tensor:
    """Ids of any kind: PADs, the beginnings and ends of documents, bytes."""
    kinds = [PAD, PAD, BOS, EOS, 10, 32]
    return torch.tensor(
        [[rng.choice([*kinds, *rng.choices(range(BYTES), k=9)]) for _ in range(width)] for _ in range(rows)]
    )


def changed(rng: random.Random, cache: ByteCache, ids: Tensor) -> tuple[ByteCache, Tensor]:
    """A cache and what it holds after something that generation does to caches."""
    match rng.choice(["crop", "reorder", "select", "repeat", "copy", "pickle"]):
        case "crop":
            count = rng.randint(0, min(90, ids.shape[1]))
            cache.crop(-count)
            ids = ids[:, : ids.shape[1] - count]
        case "reorder":
            rows = torch.tensor([rng.randrange(len(ids)) for _ in ids])
            cache.reorder_cache(rows)
            ids = ids[rows]
        case "select":
            rows = torch.tensor(sorted(rng.sample(range(len(ids)), rng.randint(1, len(ids)))))
            cache.batch_select_indices(rows)
            ids = ids[rows]
        case "repeat" if len(ids) < 3:
            cache.batch_repeat_interleave(2)
            ids = ids.repeat_interleave(2, 0)
        case "copy":
            cache = copy.deepcopy(cache)
        case "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        case _:
            pass
    return cache, ids


@pytest.mark.parametrize("name", FAST)
@torch.no_grad()
def test_whatever_is_done_to_a_cache_it_reads_what_it_holds(name: str) -> None:
    """In float64, against the forward pass over each row without its PADs."""
    rng = random.Random(name)
    with exact(MODELS[name].model) as model:
        for _ in range(3):
            cache, ids = ByteCache(), torch.zeros(rng.randint(1, 3), 0, dtype=torch.long)
            for _ in range(10):
                if ids.shape[1] and rng.random() < 0.5:
                    cache, ids = changed(rng, cache, ids)
                new, keep = odd_rows(rng, len(ids), rng.choice([1, 1, 1, 2, 5, 80])), rng.choice([0, 1, 2])
                found, ids = cache.read(model, new, keep), torch.cat([ids, new], 1)
                assert cache.reader and cache.get_seq_length() == ids.shape[1] and cache.batch_size == len(ids)
                assert found.shape == (len(ids), min(keep, new.shape[1]) or new.shape[1], VOCAB)
                for row, line, told in zip(ids, new, found, strict=True):
                    real = (row != PAD).cumsum(0)[
                        -len(told) :
                    ]  # of the row's ids, the newest at each of its last columns
                    there = (line != PAD).cumsum(0)[-len(told) :] > 0
                    if there.any():
                        wanted = model(row[row != PAD][None])[0][0, real[there] - 1]
                        torch.testing.assert_close(told[there], wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [BLT, "megabyte (three stages)", "transformer (windowed)", "perceiver (blocks of 5)"])
@torch.no_grad()
def test_rows_go_back_further_than_a_decoder_does_and_begin_anew(name: str) -> None:
    with exact(MODELS[name].model) as model:
        drawn = torch.randint(32, 127, (2, 300), generator=torch.Generator().manual_seed(0))
        cache, ids = ByteCache(), torch.cat([torch.full((2, 1), BOS), drawn], 1)
        cache.read(model, ids)
        new = torch.tensor([[65], [66]])
        steps = [
            ("crop", 1),
            ("crop", 40),
            ("crop", 40),
            ("crop", 100),
            ("BOS", 0),
            ("crop", 3),
            ("PAD", 0),
            ("crop", 99),
        ]
        for step, count in steps:  # 40 and 40 again: further than where a row was last, though not than where it is
            cache.crop(-count)
            ids = ids[:, : ids.shape[1] - count]
            for column in (torch.full((2, 1), {"BOS": BOS, "PAD": PAD}.get(step, 67)), new):
                found, ids = cache.read(model, column), torch.cat([ids, column], 1)
            real = [row[row != PAD] for row in ids]
            wanted = torch.stack([model(row[None])[0][0, -1] for row in real])
            torch.testing.assert_close(found[:, -1], wanted, atol=1e-9, rtol=0)
        assert cache.reader


def test_a_cache_holds_no_view_of_what_it_was_given() -> None:
    hf, ids, cache = wrapped(), one()["input_ids"], ByteCache()
    with torch.no_grad():
        hf(ids, past_key_values=cache)
        ids.fill_(0)
        cache.crop(-1)
        found = hf(torch.tensor([[99]]), past_key_values=cache).logits
        assert torch.equal(found[0, -1], hf(one()["input_ids"], use_cache=True).logits[0, -1])


def test_a_conversation_goes_on_and_reads_only_what_is_new() -> None:
    hf, cache, ids = wrapped(), ByteCache(), one("hello ")["input_ids"]
    for turn in (b" more", b"", b" and yet more" * 9):
        ids = torch.cat([ids, torch.tensor([[*turn]], dtype=torch.long)], 1)
        whole = hf.generate(ids, max_new_tokens=11)
        reader = cache.reader
        ids = hf.generate(ids, past_key_values=cache, max_new_tokens=11)
        assert torch.equal(ids, whole)
        assert cache.reader and reader in (None, cache.reader)
    with pytest.raises(UsageError, match="2 rows of ids for a cache of 1"):
        hf(torch.tensor([[65], [66]]), past_key_values=cache)


@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_that_has_read_the_whole_prompt_goes_on_after_it(masked: bool) -> None:
    """transformers slices `ids[:, -0:]` then, which is all of them once more."""
    hf, cache, given = wrapped(), ByteCache(), batch() if masked else one()
    with torch.no_grad():
        hf(**given, past_key_values=cache)
    assert torch.equal(
        hf.generate(**given, past_key_values=cache, max_new_tokens=9), hf.generate(**given, max_new_tokens=9)
    )


def test_a_prompt_may_be_read_in_chunks_and_in_inference_mode() -> None:
    hf, wanted = wrapped(), written(wrapped(), max_new_tokens=17)
    with torch.inference_mode():
        first = written(hf, prefill_chunk_size=7, return_dict_in_generate=True)
    assert torch.equal(first.sequences, wanted[:, :-5])
    mask = torch.cat([batch()["attention_mask"], torch.ones(3, 12, dtype=torch.long)], 1)
    options = {"attention_mask": mask, "past_key_values": first.past_key_values, "max_new_tokens": 5}
    assert torch.equal(hf.generate(first.sequences, **options), wanted)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", [*KINDS, PLAIN])
def test_rows_padded_on_the_right_go_on_after_their_ends(name: str, cached: bool) -> None:
    """Whatever piece those ends were read in: a piece of nothing but PADs has the logits of what came before it."""
    hf = wrapped(name)
    padded = dict(ByteTokenizer(padding_side="right")(TEXTS, return_tensors="pt", padding=True))
    ids, mask = padded["input_ids"], padded["attention_mask"]
    with torch.no_grad():
        wanted = hf(**padded).logits[:, -1]
        for cut in (3, 20, ids.shape[1] - 1):
            cache = hf(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True).past_key_values
            if not cached:  # what it remembers of the end is made again
                cache = copy.deepcopy(cache)
            found = hf(ids[:, cut:], attention_mask=mask, past_key_values=cache).logits[:, -1]
            assert torch.allclose(found, wanted, atol=1e-4), cut
    ids = written(hf, **padded, use_cache=False)
    assert torch.equal(written(hf, **padded, prefill_chunk_size=7), ids)
    whole = hf(**padded, use_cache=True).past_key_values
    assert torch.equal(written(hf, **padded, past_key_values=whole), ids)


def test_what_padding_goes_on_from_is_forgotten_with_what_was_read() -> None:
    """After a crop into a row, or with rows in another order, PADs have the logits of the ids that are held now."""
    hf, pads = wrapped(), torch.full((2, 2), PAD)
    ids = torch.tensor([[BOS, *b"abcdef"], [BOS, *b"ghijkl"]])
    with torch.no_grad():
        cache = hf(ids, use_cache=True).past_key_values
        cache.crop(-3)
        found = hf(pads, past_key_values=cache).logits[:, -1]
        assert torch.allclose(found, hf(ids[:, :-3]).logits[:, -1], atol=1e-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = hf(pads, past_key_values=cache).logits[:, -1]
        assert torch.allclose(found, hf(ids[[1, 0], :-3]).logits[:, -1], atol=1e-5)


def test_a_loop_of_ones_own_outgrows_its_first_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytelm.hf.cache.LEAST", 1)
    hf, ids = wrapped(), one()["input_ids"]
    with torch.no_grad():
        out, rooms = hf(ids, use_cache=True), set[int]()
        for _ in range(70):
            newest = out.logits[:, -1, :BYTES].argmax(-1, keepdim=True)
            ids = torch.cat([ids, newest], 1)
            out = hf(newest, past_key_values=out.past_key_values)
            rooms.add(out.past_key_values.reader.decoder.capacity)
    assert len(rooms) > 2 and torch.equal(ids, hf.generate(**one(), max_new_tokens=70, eos_token_id=None))


# --- never what the model is not --------------------------------------------------------------------------------------


def nudge(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight) * 0.5


def stepped(hf: Any) -> None:
    optimizer = torch.optim.SGD(hf.parameters(), 3.0)
    hf(one()["input_ids"], labels=one()["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def through_data(hf: Any) -> None:
    for layer in hf.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data += nudge(layer.weight)


def one_entry(hf: Any) -> None:
    hf.model.decoder.head.weight.data[101] += 1.0


def loaded(hf: Any) -> None:
    hf.load_state_dict(
        {name: t + nudge(t) if t.ndim > 1 and "patcher" not in name else t for name, t in hf.state_dict().items()}
    )


def replaced(hf: Any) -> None:
    for layer in hf.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight + nudge(layer.weight))


def swapped_rows(hf: Any) -> None:
    head = hf.model.decoder.head.weight
    head.data.copy_(head.data.flip(0))


def merged(hf: Any) -> None:
    """An adapter, merged into the weights that it found."""
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=r".*\.patcher\..*", init_lora_weights=False
    )
    adapted = get_peft_model(hf, config)
    adapted.merge_adapter()
    adapted.unload()


CHANGES = [stepped, through_data, one_entry, loaded, replaced, swapped_rows, merged]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kept", [False, True])
def test_changed_weights_are_read_anew(change: Callable[[Any], None], kept: bool) -> None:
    hf, cache = wrapped(), ByteCache()
    before = hf.generate(**one(), max_new_tokens=30, **({"past_key_values": cache} if kept else {}))
    change(hf)
    fresh = BytelmForCausalLM.from_lm(copy.deepcopy(hf.lm()))
    whole = fresh.generate(before, max_new_tokens=30, use_cache=False)
    assert not torch.equal(whole, wrapped().generate(before, max_new_tokens=30))
    assert torch.equal(hf.generate(before, max_new_tokens=30, **({"past_key_values": cache} if kept else {})), whole)
    prompt = TOKENIZER.to_bytes(before[0])
    assert hf.lm().generate(prompt, max_bytes=9, temperature=0) == TOKENIZER.to_bytes(whole[0, before.shape[1] :])[:9]


def doubled(hf: Any) -> Any:
    return hf.model.decoder.head.register_forward_hook(lambda module, args, out: -out)


def adapted(hf: Any) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=r".*\.patcher\..*", init_lora_weights=False
    )
    return get_peft_model(hf, config)


def parametrized(hf: Any) -> Any:
    return parametrizations.orthogonal(hf.model.decoder.head)


def overridden(hf: Any) -> Any:
    head = hf.model.decoder.head
    head.forward = lambda x: -nn.functional.linear(x, head.weight)


def halved(hf: Any) -> Any:
    hf.half()


FOREIGN = {doubled: "a hook", adapted: "peft", parametrized: "Parametrized", overridden: "a hook", halved: "float16"}


@pytest.mark.parametrize("change", FOREIGN)
def test_what_kernels_would_pass_over_is_read_by_the_forward_pass(change: Callable[[Any], Any]) -> None:
    hf = wrapped()
    plain = hf.generate(**one(), max_new_tokens=20)
    change(hf)
    assert FOREIGN[change] in why_plain(hf.model)
    ids = hf.generate(**one(), max_new_tokens=20)
    assert torch.equal(ids, hf.generate(**one(), max_new_tokens=20, use_cache=False))
    assert change is halved or not torch.equal(ids, plain)
    ours = hf.lm().generate(b"abcabcabcabc", max_bytes=20, temperature=0)
    assert ours == TOKENIZER.to_bytes(ids[0, one()["input_ids"].shape[1] :])


def test_gradients_and_dropout_never_go_through_a_decoder() -> None:
    hf, ids = wrapped(), one()["input_ids"]
    out = hf(ids, use_cache=True)
    assert out.past_key_values.reader is None and out.logits.requires_grad
    with torch.no_grad():
        cache = hf(ids, use_cache=True).past_key_values
    assert cache.reader
    out = hf(torch.tensor([[65]]), past_key_values=cache)
    out.logits.sum().backward()
    assert cache.reader is None and hf.model.decoder.head.weight.grad.abs().sum() > 0
    cache = hf.generate(**one(), max_new_tokens=3, return_dict_in_generate=True).past_key_values
    hf.train()
    with torch.no_grad():
        hf(torch.tensor([[65]]), past_key_values=cache)
    assert cache.reader is None
    with forwards(hf) as seen:
        hf.generate(**one(), max_new_tokens=3)
    assert len(seen) == 3


def test_a_checksum_tells_any_change() -> None:
    from bytelm.native.kernels import FOLD, checksum

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in ((3, 5), (64, 2 * FOLD + 1), (97, 301), (0, 4)):
            whole = torch.randn(*shape).to(dtype)
            for weight in (whole, whole.permute(*reversed(range(whole.ndim))), whole[1:] if whole.numel() else whole):
                found = checksum(weight)
                assert found == checksum(weight.clone())
                if weight.numel():
                    assert found != checksum(weight.flip(0)) and found != checksum(weight.flip(-1))
                    other = weight.clone()
                    other[-1, 0] += 1
                    assert found != checksum(other)


# --- the loop's own steps ---------------------------------------------------------------------------------------------


def test_quick_steps_are_the_steps_of_transformers() -> None:
    ids, scores = torch.tensor([[65, EOS], [66, 67]]), torch.randn(2, VOCAB)
    theirs = logits_process.LogitsProcessorList(
        [logits_process.SuppressTokensLogitsProcessor([PAD, BOS]), logits_process.TemperatureLogitsWarper(0.7)]
    )
    ours = loop.quick_processors(theirs)
    assert type(ours[0]) is loop.Suppressed and ours[1] is theirs[1]
    assert torch.equal(ours(ids, scores), theirs(ids, scores)) and scores.isfinite().all()
    assert torch.equal(ours(ids, scores[:, :258]), theirs(ids, scores[:, :258]))
    for ends in ([EOS], [EOS, 67]):
        for most in (2, 3):
            criteria = stopping_criteria.StoppingCriteriaList(
                [stopping_criteria.MaxLengthCriteria(most), stopping_criteria.EosTokenCriteria(torch.tensor(ends))]
            )
            quick = loop.quick_criteria(criteria)
            assert torch.equal(quick(ids, None), criteria(ids, None)) and quick.max_length == most
    never = stopping_criteria.StoppingCriteriaList([stopping_criteria.MaxLengthCriteria(3)])
    assert torch.equal(loop.quick_criteria(never)(ids, None), never(ids, None))
    logits, cache = torch.zeros(1, 1, VOCAB), ByteCache()
    quick, plain = loop.quick_output(logits, cache), CausalLMOutputWithPast(None, logits, cache)
    assert type(quick) is type(plain) and list(quick) == list(plain) and vars(quick).keys() == vars(plain).keys()
    assert quick.logits is quick["logits"] is quick[0] is logits and quick.to_tuple() == (logits, cache)
    assert quick.past_key_values is cache and quick.loss is None


def test_memory_that_does_not_suffice_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from bytelm.hf import reader

    def full(model: ByteModel, *, rows: int, capacity: int) -> Any:
        if capacity > most:
            raise MemoryError
        return open_decoder(model, rows=rows, capacity=capacity)

    monkeypatch.setattr(reader, "open_decoder", full)
    most = 100
    assert reader.opened(MODELS[BLT].model, 2, 40, 1 << 20).capacity <= 100
    most = 20
    with pytest.raises(ResourceError, match="no memory for 2 sequences of 40 ids"):
        reader.opened(MODELS[BLT].model, 2, 40, 1 << 20)
