"""transformers' `generate` over the decoder: the same bytes as `LM.generate`, and never anything the model is not."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.generation import logits_process, stopping_criteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from bytelm.decoding import open_decoder, why_plain
from bytelm.errors import ResourceError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.units import BOS, EOS, PAD, VOCAB
from hf_models import TOKENIZER
from hf_writers import BLT, FAST, KINDS, MODELS, PLAIN, PROMPTS, batch, forwards, one, wrapped, written

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from peft import LoraConfig, get_peft_model

    from bytelm.hf import BytelmForCausalLM, loop
    from bytelm.hf.cache import ByteCache

pytestmark = [
    pytest.mark.skipif(not FAST, reason="no kernels here: there is no C++ compiler"),
    # peft asks transformers by a name that it has given another.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


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


@pytest.mark.parametrize(
    ("change", "kept"),
    [(change, True) for change in CHANGES]
    + [pytest.param(change, False, marks=() if change is stepped else pytest.mark.slow) for change in CHANGES],
)
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
    from bytelm.native.weights import SUMS, checksum

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in ((3, 5), (64, 2 * SUMS + 1), (97, 301), (0, 4)):
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
