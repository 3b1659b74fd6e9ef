"""Models of transformers, tokenizers of every kind: bits are those of a loop over tokens, bytes those of the file."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelm.errors import CheckpointError, DataError, UsageError
from bytelm.evaluate.bits import DocumentBits, measure
from bytelm.hf.foreign import Foreign, load_foreign
from bytelm.hf.proof import prove
from bytelm.hf.verdict import judge_foreign, sample, survey
from bytelm.interfaces.objective import nats_of
from bytelm.units import BOS, LN2, PAD, VOCAB
from hf_tokenizers import KINDS, TEXT, llama, saved

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

MIXED = "The quick\r\nbrown fox,  it is ﬁne: été 中文 </s> <|endoftext|> [UNK] <0x41> <think> \ufeff" + TEXT
DOCUMENTS = [("a.txt", MIXED.encode()), ("b.txt", b""), ("c.txt", b" x"), ("d.txt", TEXT.encode() * 2)]

# What comes before a document, and whether it comes before every window.
STARTS: dict[str, tuple[list[str], bool]] = {
    "byte-level BPE": (["<|endoftext|>"], False),
    "byte-level BPE, a space added": (["<|endoftext|>"], False),
    "BPE with byte fallback": (["<s>"], True),
    "BPE with unknown tokens": (["</s>"], False),
    "unigram, NFKC": (["</s>"], False),
    "unigram with bytes and a dummy prefix": (["<s>"], True),
    "WordPiece, lower case": (["[CLS]"], True),
    "bytes": (["</s>"], False),
    "byte-level BPE, line ends normalized": (["<|endoftext|>"], False),
    "byte-level BPE, tokens added": (["<|endoftext|>"], False),
    "byte-level BPE, no BOS": ([], False),
}
# What is lost of MIXED.
LOSSES: dict[str, set[str]] = {
    "byte-level BPE": set(),
    "byte-level BPE, a space added": {"leading space"},
    "BPE with byte fallback": set(),
    "BPE with unknown tokens": {"unknown tokens"},
    "unigram, NFKC": {"unknown tokens", "white space"},
    "unigram with bytes and a dummy prefix": {"other characters"},  # <0x41> is read as a byte
    "WordPiece, lower case": {"unknown tokens", "white space", "case", "accents"},
    "bytes": set(),
    "byte-level BPE, line ends normalized": {"line ends"},
    "byte-level BPE, tokens added": set(),
    "byte-level BPE, no BOS": set(),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(folder: Path, kind: str, **how: Any) -> Foreign:
    return load_foreign(saved(folder, KINDS[kind](), **how))[0]


def bits(model: Foreign, data: bytes, **how: Any) -> DocumentBits:
    (found,) = measure(model, [("", data)], **how)
    return found


@kinds
def test_of_a_uniform_model_bits_are_those_of_the_vocabulary(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path, kind, uniform=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    width = AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size
    report = judge_foreign(model, DOCUMENTS, model.context())
    tokens = sum(
        len(tokenizer(data.decode(), add_special_tokens=False, split_special_tokens=True)["input_ids"])
        for _, data in DOCUMENTS
    )
    assert report.verdict.bytes == sum(len(data) for _, data in DOCUMENTS)  # of the files
    assert report.verdict.bits == pytest.approx(tokens * math.log2(width), rel=1e-6)
    assert report.survey.tokens == tokens and report.vocabulary == width
    assert report.verdict.documents == 4 and len(report.verdict.files) == 3  # one is empty
    assert report.verdict.low is not None and "xz" in report.verdict.compressors


@kinds
def test_bits_are_those_of_a_loop_over_tokens(kind: str, tmp_path: Path) -> None:
    """With the tokenizer and the model as transformers loads them, one prediction at a time."""
    ours = made(tmp_path, kind)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    before, always = STARTS[kind]
    prefix = [] if not before else tokenizer.convert_tokens_to_ids(before)
    text, context, stride = TEXT[20:120], 16, 6
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    wanted = 0.0
    for place in range(1, len(ids) + 1):  # of BOS and these ids
        start = 0 if place <= context else math.ceil((place - context) / stride) * stride
        seen = prefix + ids[: place - 1] if not start else (prefix if always else []) + ids[start - 1 : place - 1]
        with torch.inference_mode():
            logits = model(torch.tensor([seen])).logits[0, -1] if seen else torch.zeros(model.config.vocab_size)
        wanted -= float(logits.double().log_softmax(-1)[ids[place - 1]])
    for batch in (1, 3, 8):
        found = bits(ours, text.encode(), context=context, stride=stride, batch=batch)
        assert found.nats == pytest.approx(wanted, rel=1e-6) and found.bytes == len(text.encode())


@kinds
def test_what_is_lost_is_said_and_coded(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    report = judge_foreign(model, DOCUMENTS, model.context(), proved=True)
    lost = {one.kind for one in survey(model.tokens, DOCUMENTS[:1]).losses}
    assert lost >= LOSSES[kind] and (LOSSES[kind] or not lost)
    assert (list(report.start), report.every_window) == STARTS[kind]
    assert report.exact == (not report.survey.losses) == (report.bound == report.verdict.bits_per_byte)
    assert report.bound >= report.verdict.bits_per_byte
    proof = report.proof
    assert proof is not None and proof.bytes == sum(len(data) for _, data in DOCUMENTS)
    assert proof.bits == pytest.approx(report.verdict.bits + report.survey.extra_bits, rel=1e-6)
    assert proof.bits - 8 <= proof.coded_bits <= proof.bits * 1.0001 + 64
    assert report.mapping()["losses"] == tuple(vars(one) for one in report.survey.losses)


@kinds
def test_a_special_token_in_a_file_is_text(kind: str, tmp_path: Path) -> None:
    """A unigram has specials among its pieces, and is left out: `test_foreign_folders` has what is said of it."""
    model = made(tmp_path, kind)
    if kind.startswith("unigram"):
        return
    for text in ("a <|endoftext|> b", "a</s>b", "[CLS] a", "<|im_start|>a", "<pad>"):
        found = survey(model.tokens, [("", text.encode())])
        assert found.special_tokens == 0, text
    ids = model.tokens.encode(b"a <think> b") - VOCAB
    assert ("<think>" in model.tokens.tokenizer.convert_ids_to_tokens(ids.tolist())) == (kind.endswith("tokens added"))


@pytest.mark.parametrize("kind", ["byte-level BPE", "bytes", "byte-level BPE, no BOS"])
def test_bytes_that_are_not_text_are_coded_where_they_are_tokens(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    for data in (bytes(range(256)), "für ".encode("latin-1") * 3, b"\xed\xa0\x80 a", b"\xff"):
        assert model.tokens.decode(model.tokens.encode(data).tolist()) == data
        report = judge_foreign(model, [("x", data)], model.context(), proved=True)
        assert report.exact and report.verdict.bytes == len(data)
    assert model.tokens.sizes[model.tokens.encode(TEXT.encode())].sum() == len(TEXT.encode())


@pytest.mark.parametrize("kind", ["BPE with byte fallback", "unigram, NFKC", "WordPiece, lower case"])
def test_a_file_that_is_not_utf8_is_named(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    with pytest.raises(DataError, match=r"b\.txt: byte 3 is not UTF-8, and this tokenizer reads text alone"):
        judge_foreign(model, [("a.txt", b"a"), ("b.txt", b"\xc3\xa9a\xe9b\xe9")], 32)


def test_windows_do_not_depend_on_the_batch_or_on_padding(tmp_path: Path) -> None:
    model = made(tmp_path, "BPE with byte fallback")
    data = [("", (TEXT[at:] * 2)[: 40 * at + 3].encode()) for at in range(7)]
    how = {"context": 20, "stride": 7}
    one, many = (list(measure(model, data, batch=batch, **how)) for batch in (1, 5))
    for found, other in zip(one, many, strict=True):
        assert found.bytes == other.bytes and found.nats == pytest.approx(other.nats, rel=1e-6)
    ids = torch.tensor([BOS, *model.tokens.encode(TEXT[:30].encode())])
    alone = model(ids[None])[0][0]
    padded = torch.full((3, 2 * len(ids)), PAD)
    padded[0, ::2], padded[1, len(ids) :] = ids, ids
    logits, _ = model(padded)
    torch.testing.assert_close(logits[0, ::2], alone)
    torch.testing.assert_close(logits[1, len(ids) :], alone)
    assert logits.shape == (3, 2 * len(ids), model.vocabulary) and bool((alone[:, :VOCAB] == -math.inf).all())


@pytest.mark.parametrize("kind", ["BPE with byte fallback", "byte-level BPE", "byte-level BPE, no BOS"])
def test_a_state_is_read_on_from(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    ids = torch.tensor([[BOS, *model.tokens.encode(TEXT[:30].encode())]])
    whole, state = model(ids)[0], model.initial_state(1)
    assert model(ids)[1] is None
    parts: list[torch.Tensor] = []
    for part in ids.split(3, 1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    first = nats_of(whole[:, :1], ids[:, 1:2])
    if kind == "byte-level BPE, no BOS":  # the first token is any of them
        assert float(first) == pytest.approx(math.log(model.tokens.width))


def test_a_short_stride_predicts_from_more(tmp_path: Path) -> None:
    """The windows are ours: with stride 1 each token is predicted from as many as the context allows."""
    model = made(tmp_path, "byte-level BPE")
    data, context = TEXT[:90].encode(), 8
    ids = [BOS, *model.tokens.encode(data).tolist()]
    wanted = 0.0
    for place in range(1, len(ids)):
        seen = torch.tensor([ids[max(0, place - context) : place]])
        wanted += float(nats_of(model(seen)[0][:, -1:], torch.tensor([[ids[place]]])))
    assert bits(model, data, context=context, stride=1).nats == pytest.approx(wanted, rel=1e-6)
    assert bits(model, data, context=context, stride=8).nats != pytest.approx(wanted, rel=1e-3)


def test_positions_limit_the_context(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"]()
    width = max(tokenizer.get_vocab().values()) + 1
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=24, vocab_size=width, bos_token_id=0, eos_token_id=0
    )
    model, context = load_foreign(saved(tmp_path / "gpt2", tokenizer, GPT2LMHeadModel(config)))
    assert context == model.longest == 24 and model.context(10) == 10
    with pytest.raises(UsageError, match="--context 25: this model has positions for 24 tokens: take at most that"):
        model.context(25)
    with pytest.raises(UsageError, match="25 tokens at once: this model has positions for 24"):
        model(torch.tensor([[BOS] + [VOCAB] * 24]))
    assert bits(model, TEXT.encode() * 3, context=24).bytes == 3 * len(TEXT.encode())  # longer than positions
    with_bos, _ = load_foreign(saved(tmp_path / "bos", KINDS["BPE with byte fallback"](), positions=24))
    assert with_bos.longest == 23 and bits(with_bos, TEXT.encode(), context=23).nats > 0
    long = made(tmp_path / "long", "bytes", positions=100000)
    assert long.context() == 1024 and long.batch(1024) == 8 and long.batch(100000) == 2


def test_a_window_has_at_least_one_token_and_padded_ids_stand_for_nothing(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"]()
    width = max(tokenizer.get_vocab().values()) + 1
    model, _ = load_foreign(saved(tmp_path, tokenizer, llama(width + 7)))
    with pytest.raises(UsageError, match="--context 0: give at least 1 token"):
        model.context(0)
    assert model.tokens.decode([VOCAB + width + 6, *model.tokens.encode(b"a").tolist()]) == b"a"


def test_added_tokens_are_their_text_and_sizes_are_those_of_the_text(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"]()
    tokenizer.add_tokens(["é"])  # a letter of the alphabet that stands for other bytes
    model, _ = load_foreign(saved(tmp_path / "added", tokenizer))
    report = survey(model.tokens, [("", "été <|endoftext|>".encode())])
    assert not report.changed and not report.special_tokens
    fallback = made(tmp_path / "fallback", "BPE with byte fallback").tokens
    ids = fallback.encode("the fox 中".encode())
    assert fallback.sizes[ids].sum() == len(" the fox 中".encode())  # with the space that goes in front


def test_weights_of_half_precision_are_read_in_float32(tmp_path: Path) -> None:
    tokenizer = KINDS["bytes"]()
    model, _ = load_foreign(saved(tmp_path, tokenizer, llama(len(tokenizer)).half()))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_ids_that_are_no_tokens_are_refused(tmp_path: Path) -> None:
    model = made(tmp_path, "bytes")
    for ids in ([BOS, 65], [BOS, VOCAB, BOS]):
        with pytest.raises(UsageError, match="is no token of this model"):
            model(torch.tensor([ids]))
    with pytest.raises(UsageError, match="evaluated here, and not trained"):
        model.init_weights(0)
    with pytest.raises(DataError, match="there is nothing to evaluate"):
        judge_foreign(model, [("a", b""), ("b", b"")], 32)
    assert model(torch.full((2, 3), PAD))[0].shape == (2, 3, model.vocabulary)


def test_a_proof_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tmp_path, "bytes")
    called = model.called

    def otherwise(ids: Any, **cache: Any) -> Any:
        found = called(ids, **cache)
        found.logits *= 5 if cache else 1
        return found

    monkeypatch.setattr(model, "called", otherwise)
    with pytest.raises(CheckpointError, match="the model gives other probabilities token by token than all at once"):
        prove(model, [TEXT.encode()], 32, 16)


def test_the_sample_ends_at_a_character() -> None:
    assert sample([("", b""), ("", "a中".encode() * 1024), ("", b"rest")]) == [b"", "a中".encode() * 1024]
    assert sample([("", b"a" + "é".encode() * 3000)]) == [b"a" + "é".encode() * 2048]
    assert sample([("", b"\x80" * 5000)]) == [b"\x80" * 4099]
    assert sample([("", b"ab"), ("", b"cd")]) == [b"ab", b"cd"]


def test_the_first_bits_are_in_the_sum(tmp_path: Path) -> None:
    """One token alone is scored, from what comes before it."""
    model = made(tmp_path, "byte-level BPE, no BOS")
    assert bits(model, b"a", context=8).nats / LN2 == pytest.approx(math.log2(model.tokens.width))
    assert llama(40, uniform=True).lm_head.weight.abs().max() == 0
