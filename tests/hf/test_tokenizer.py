"""The tokenizer of bytes: any text comes back, no text is a special id, and stop strings are met at their last byte."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytelm.errors import UsageError
from bytelm.units import BOS, EOS, PAD, RESERVED, VOCAB

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from transformers import AutoTokenizer


from bytelm.hf import ByteTokenizer
from hf_models import BLT, TOKENIZER, saved, wrapped

# peft asks transformers by a name that it has given another.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


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
