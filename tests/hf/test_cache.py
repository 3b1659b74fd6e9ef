"""The cache of transformers' `generate`: whatever is done to it, it reads what it holds."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import pytest
import torch
from torch import Tensor

from bytelm.errors import UsageError
from bytelm.testing.exact import exact
from bytelm.units import BOS, BYTES, EOS, PAD, VOCAB
from hf_models import TEXTS
from hf_writers import BLT, FAST, KINDS, MODELS, PLAIN, batch, one, wrapped, written

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from bytelm.hf import ByteTokenizer
    from bytelm.hf.cache import ByteCache

pytestmark = [
    pytest.mark.skipif(not FAST, reason="no kernels here: there is no C++ compiler"),
    # peft asks transformers by a name that it has given another.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


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
