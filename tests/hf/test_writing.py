"""What a model of transformers writes is compared as text, whatever its tokens are one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bytelm.hf.foreign import Foreign, load_foreign
from bytelm.hf.writing import writes
from bytelm.units import VOCAB
from hf_tokenizers import KINDS, saved

PROMPT, END = b"the quick brown", b"\n"
NO_LINES = {"unigram, NFKC", "unigram with bytes and a dummy prefix", "WordPiece, lower case"}  # of one token each


def scripted(folder: Path, kind: str, patch: pytest.MonkeyPatch, text: bytes, end: bytes | None) -> Foreign:
    """A model that writes `text` after PROMPT, and then a token of `end`, or EOS for None, and so on for ever."""
    model, _ = load_foreign(saved(folder, KINDS[kind]()))
    prompt = model.tokens.encode(PROMPT).tolist()
    whole = model.tokens.encode(PROMPT + text).tolist()
    assert whole[: len(prompt)] == prompt and model.tokens.decode(whole).strip() == PROMPT + text
    last = model.tokens.tokenizer.eos_token_id if end is None else int(model.tokens.encode(b"a" + end)[-1]) - VOCAB
    script = [symbol - VOCAB for symbol in whole[len(prompt) :]] + [last]
    begun = len(model.start.ids) + len(prompt)
    specials = list(model.tokens.specials - {last, model.tokens.tokenizer.eos_token_id})

    def called(ids: Any, **cache: Any) -> Any:
        logits = torch.zeros(*ids.shape, model.tokens.width)
        logits[:, -1, script[min(ids.shape[1] - begun, len(script) - 1)]] = 2.0
        logits[:, -1, specials] = 3.0  # which are not written
        return SimpleNamespace(logits=logits)

    patch.setattr(model, "called", called)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_before_a_word_is_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tokenizers a token that begins with a space has none when it is decoded alone."""
    model = scripted(tmp_path / "lines", kind, monkeypatch, b" fox jumps", None if kind in NO_LINES else END)
    if model.tokens.tokenizer.eos_token_id is None and kind in NO_LINES:
        assert writes(model, PROMPT, b" fox jumps", END) is False  # it has no way to end
        return
    assert writes(model, PROMPT, b" fox jumps", END) is True
    for other in (b" fox", b" fox jumps over", b" lazy dog a", b"fox jumps"):
        assert writes(model, PROMPT, other, END) is False, other


def test_a_document_that_ends_ends_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(tmp_path, "BPE with byte fallback", monkeypatch, b" fox", None)
    assert writes(model, PROMPT, b" fox", END) is True and writes(model, PROMPT, b" foxes", END) is False


@pytest.mark.parametrize("kind", ["BPE with byte fallback", "byte-level BPE", "bytes"])
def test_a_character_of_several_tokens_is_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " 中中 fox".encode()
    model = scripted(tmp_path, kind, monkeypatch, text, END)
    assert len(model.tokens.encode(text)) > 6 and writes(model, PROMPT, text, END) is True


def test_what_it_has_no_positions_for_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of room for each byte; BOS is one too where the tokenizer puts it before every window."""
    for kind, own in (("bytes", 64), ("byte-level BPE, no BOS", 64), ("BPE with byte fallback", 63)):
        model = scripted(tmp_path / kind, kind, monkeypatch, b" fox", END)
        assert model.longest == own
        fits = own - 1 - len(model.tokens.encode(PROMPT))
        assert writes(model, PROMPT, b"x" * fits, END) is False
        assert writes(model, PROMPT, b"x" * (fits + 1), END) is None
    monkeypatch.setattr(type(model), "positions", None)
    assert writes(model, PROMPT, b"x" * 1000, END) is False
