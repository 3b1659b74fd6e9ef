"""The errors of naive bits per byte: each way counted by hand on a model whose bits are whole numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bytelm.hf.encoding import TextTokens
from bytelm.hf.foreign import Foreign
from programs import program

naive_ways, naive_bits = program("naive_ways"), program("naive_bits")


class Bigram(torch.nn.Module):
    """Of 512 ids. After <s> 4 of them cost 2 bits each, after </s> 8 of them 3 bits, after anything else all 9 bits."""

    def __init__(self, vocab: dict[str, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=99)
        table = torch.zeros(512, 512)
        for before, after in (("<s>", ["▁a", "▁", "<0xC3>", "</s>"]), ("</s>", ["▁a", "▁", "<s>", "</s>", *"abcd"])):
            table[vocab[before]] = float("-inf")
            table[vocab[before], [vocab.get(token, 500 + ord(token[0]) % 5) for token in after]] = 0
        self.table = torch.nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def case() -> Any:
    """Two documents: ▁a ▁ b ▁ C3 A9, which are 6 bytes, and ▁ b 0A, which are 2; each between <s> and </s>."""
    tokens = ["<unk>", "<s>", "</s>", *naive_bits.PIECES, "▁", "a", "b", "▁a"]
    vocab = {token: symbol for symbol, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = naive_bits.fast(made, "<s> $A </s>", specials)
    model = Foreign(Bigram(vocab), TextTokens(tokenizer, 512))
    return naive_ways.Case(model, [("one", "a b é".encode()), ("two", b"b\n")], 4, ratio=0.5)


def test_naive_bits_are_those_that_are_counted_by_hand(case: Any) -> None:
    assert case.ours == pytest.approx([2 + 5 * 9, 2 + 2 * 9]) and (case.bytes, case.tokens) == (8, 9)
    by_hand = {
        "first left out": 7 * 9,
        "without BOS": 7 * 9,
        "BOS twice": 67,
        "EOS for BOS": 2 * 3 + 7 * 9,
        "specials scored": 67 + 2 * 9,
        # <s> ▁a ▁ b ▁, <s> C3 A9 </s> </s>, <s> ▁ b 0A </s>: 12 are predicted, and 9 are tokens
        "padding scored": 9 / 12 * ((2 + 27) + (2 + 9 + 9 + 3) + (2 + 18 + 9)),
        "no overlap": 67,
        "window firsts out": 3 * 9 + 9 + 2 * 9,
        "mean times tokens": 9 * 9,
        # <s> ▁a ▁ b, ▁ b ▁ C3, ▁ C3 A9 and <s> ▁ b 0A: 11 are predicted
        "overlaps twice": 9 / 11 * ((2 + 18) + 27 + 18 + (2 + 18)),
        "cut to context": (2 + 27) + (2 + 18),
        "mean of documents": 8 * (47 / 6 + 20 / 2) / 2,
        "space in front": 67,
        # ▁a ▁ b ▁ and C3 A9 and ▁ b, each after <s>
        "stripped lines": (2 + 27) + (2 + 9) + (2 + 9),
    }
    assert {name: way(case) for name, way in naive_ways.BITS.items()} == pytest.approx(by_hand)


def test_naive_bytes_are_those_that_are_counted_by_hand(case: Any) -> None:
    by_hand = {
        "decoded text": len("<s> a b é</s>".encode()) + len("<s> b\n</s>"),
        "tokens decoded": (1 + 0 + 1 + 0 + 3 + 3) + (0 + 1 + 1),  # half an é is U+FFFD
        "token strings": (4 + 3 + 1 + 3 + 6 + 6) + (3 + 1 + 6),
        "spaces twice": 8 + 3 + 1,
        "other text's ratio": 9 / 0.5,
        "characters": 5 + 2,
    }
    assert {name: way(case) for name, way in naive_ways.BYTES.items()} == pytest.approx(by_hand)
    errors = naive_ways.errors(case)
    assert errors["spaces twice"] == pytest.approx(100 * (8 / 12 - 1))
    assert errors["cut to context"] == pytest.approx(100 * (49 / 67 - 1))
    assert errors["no overlap"] == pytest.approx(0, abs=1e-4)


def test_the_documents_of_naive_bits_are_evenly_spaced(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n:03}\n\n" for n in range(100)))
    lines = [[data for _, data in naive_bits.documents(str(text), 0, 40, seed)] for seed in (0, 1)]
    assert lines[0] == [b"%03d\n" % n for n in range(0, 100, 10)]
    assert lines[1] == [b"%03d\n" % n for n in range(6, 100, 10)]
    parts = [data for _, data in naive_bits.documents(str(text), 7, 10**6, 0)]
    assert b"".join(parts) == text.read_bytes()[:-1], "all but the last line, which is blank"


@pytest.mark.parametrize("kind", ["BPE, byte fallback (Llama 2)", "bytes (ByT5)"])
def test_naive_bits_end_to_end(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} says {n**3}, or naïve.\n" for n in range(300)))
    small = [str(text), str(text), "--steps", "2", "--seeds", "2", "--context", "16", "--vocabulary", "500"]
    small += ["--document", "200", "0", "--bytes", "600", "--kinds", kind]
    assert naive_bits.main([*small, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["seed"], row["document"]) for row in rows] == [(0, 200), (0, 0), (1, 200), (1, 0)]
    assert all(set(row["errors"]) == {*naive_ways.BITS, *naive_ways.BYTES, "at most"} for row in rows)
    assert (rows[0]["errors"]["spaces twice"] is None) == (kind == "bytes (ByT5)")
    assert rows[0]["errors"]["no overlap"] != 0 and rows[0]["changed"] == 0
    assert naive_bits.main(small) == 0
    written = capsys.readouterr().out
    mean = np.mean([row["errors"]["characters"] for row in rows if row["document"] == 200])
    assert f"| characters | {mean:+.1f} ± " in written and written.count("| bits per byte |") == 2
