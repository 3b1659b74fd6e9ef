"""Byte-pair encoding: exact on any bytes, and what it cannot learn is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bytelm.data.bpe import LONGEST, NONE, Bpe
from bytelm.data.pack import pack
from bytelm.data.tokens import encoded
from bytelm.errors import ConfigError, DataError, MissingExtraError
from bytelm.units import BOS, BYTES, EOS, PAD, RESERVED, VOCAB
from token_texts import TEXT, noise

SCRIPTS = "Ünïcode, Привет мир, 你好世界, नमस्ते, 🙂🙃\r\n\t  x = 12345; déjà vu".encode() * 5
CODERS = {
    "text": Bpe.learn([TEXT, SCRIPTS], 400),
    "noise": Bpe.learn([noise(30_000)], 700),
    "empty": Bpe.empty(300),
}

DATA = {f"{size} of noise": noise(size, size) for size in (0, 1, 2, 3, 7, 31, 32, 33, 64, 257, 1000, 5003)}
DATA |= {f"{size} of {byte}": bytes([byte]) * size for byte in (0, 9, 10, 32, 48, 97, 255) for size in (LONGEST, 999)}
DATA |= {"every byte": bytes(range(256)) * 2, "text": TEXT, "scripts": SCRIPTS, "cut": SCRIPTS[1:-1]}
DATA |= {"not UTF-8": b"\xc3(\xff\xfe\x80 \xf0\x9f\x99 ok \xed\xa0\x80", "spaces": b"  a   b \n\n c\x0b\x0c\r\n  "}


@pytest.mark.parametrize("coder", CODERS)
def test_decoding_takes_encoding_back_on_any_bytes(coder: str) -> None:
    tokens = CODERS[coder]
    for name, data in DATA.items():
        ids = tokens.encode(data)
        assert tokens.decode(ids.tolist()) == data, name
        assert int(tokens.sizes[ids].sum()) == len(data), name
        assert not set(ids.tolist()) & {PAD, BOS, EOS, RESERVED}, name


def test_tokens_are_what_was_learnt_and_not_bytes_again() -> None:
    assert len(CODERS["text"].encode(TEXT)) < len(TEXT) / 3
    assert len(CODERS["noise"].encode(noise(30_000))) < 30_000
    assert CODERS["empty"].encode(TEXT).tolist() == list(TEXT)
    assert CODERS["text"].encode(b"").tolist() == []


@pytest.mark.parametrize("coder", CODERS)
def test_ids_are_bytes_then_specials_then_tokens(coder: str) -> None:
    tokens = CODERS[coder]
    assert tokens.data[:BYTES] == [bytes([i]) for i in range(BYTES)]
    assert tokens.data[BYTES:VOCAB] == [b""] * 4 and tokens.sizes[BYTES:VOCAB].tolist() == [0] * 4
    for id, (left, right) in enumerate(tokens.merges.tolist(), VOCAB):
        assert tokens.data[id] == (b"" if left == NONE else tokens.data[left] + tokens.data[right])
    assert tokens.sizes.tolist() == [len(data) for data in tokens.data]
    learnt = [data for data in tokens.data[VOCAB:] if data]
    assert len(set(learnt)) == len(learnt) and all(1 < len(data) <= LONGEST + 1 for data in learnt)
    for data in learnt:
        assert tokens.decode(tokens.encode(data).tolist()) == data


@pytest.mark.parametrize("vocabulary", [261, 300, 1000])
def test_the_vocabulary_is_as_large_as_was_asked_for(vocabulary: int) -> None:
    tokens = Bpe.learn([TEXT, SCRIPTS], vocabulary)
    assert (tokens.vocabulary, len(tokens.data), len(tokens.sizes)) == (vocabulary,) * 3
    assert tokens.merges.shape == (vocabulary - VOCAB, 2)
    assert vocabulary == 1000 or (tokens.merges != NONE).all()
    assert np.array_equal(Bpe.learn([TEXT, SCRIPTS], vocabulary).merges, tokens.merges)


def test_too_little_data_leaves_merges_out_and_they_are_no_ids() -> None:
    tokens = Bpe.learn([b"abab abab"], 300)
    there = tokens.merges[:, 0] != NONE
    assert 0 < there.sum() < 10 and not there[int(there.sum()) :].any()
    assert (tokens.merges[~there] == NONE).all() and not tokens.sizes[VOCAB:][~there].any()
    for data in DATA.values():
        assert tokens.sizes[tokens.encode(data)].all()
    assert len(tokens.encode(b"abab abab")) <= 3


def test_a_megabyte_of_one_byte_is_learnt_from() -> None:
    zeros = bytes(1 << 20)
    tokens = Bpe.learn([zeros], 300)
    ids = tokens.encode(zeros)
    assert len(ids) <= len(zeros) / 16 and tokens.decode(ids.tolist()) == zeros


@pytest.mark.parametrize("vocabulary", [0, 256, VOCAB])
def test_a_vocabulary_without_tokens_is_refused(vocabulary: int) -> None:
    with pytest.raises(ConfigError, match=f"vocabulary of {vocabulary} .*260"):
        Bpe.learn([TEXT], vocabulary)


@pytest.mark.parametrize("pair", [(97, 261), (261, 97), (262, 97), (-2, 97), (97, NONE), (97, PAD), (BOS, 97)])
def test_merges_of_what_is_not_there_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="merge 1 joins"):
        Bpe(np.array([(97, 98), pair]))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for use in (lambda: Bpe.learn([TEXT], 300), lambda: Bpe.empty(300).encode(b"a")):
        with pytest.raises(MissingExtraError, match=r"needs tokenizers.*bytelm\[bpe\]"):
            use()


@pytest.mark.parametrize(("vocabulary", "width"), [(400, 2), (1 << 16, 2), (70_000, 4)])
def test_a_corpus_of_tokens_holds_each_document_once_encoded(
    vocabulary: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{i}.txt" for i in range(6)]
    for i, file in enumerate(files):
        file.write_bytes(SCRIPTS + TEXT[: 700 * i] + b"%d" % i)
    corpus = pack(files, tmp_path / "packed", valid=0.2, test=0.2, seed=0)
    merges = np.full((vocabulary - VOCAB, 2), NONE)
    merges[: 400 - VOCAB] = CODERS["text"].merges
    tokens, told = Bpe(merges), list[int]()
    assert encoded(corpus, Bpe.empty(vocabulary)).total == corpus.total
    for again in (False, True):
        if again:
            monkeypatch.delattr(Bpe, "encode")
        source = encoded(corpus, tokens, told.append)
        assert (told[-1], len(told)) == (corpus.total, len(corpus.documents()))
        for split in (None, "train", "valid", "test"):
            packed, table = corpus.documents(split), source.documents(split)
            for start, size, first, count in zip(packed.starts, packed.sizes, table.starts, table.sizes, strict=True):
                ids = source.read(int(first), int(count))
                assert ids.dtype.itemsize == width
                assert tokens.decode(ids.tolist()) == corpus.read(int(start), int(size)).tobytes()
    assert source.total == int(source.documents().sizes.sum()) < corpus.total / 2
