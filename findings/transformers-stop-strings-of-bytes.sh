#!/usr/bin/env bash
# A tokenizer of bytes is the easiest one to find a stop string with, one would think: "é" is two tokens, always the same.
# With transformers' own byte tokenizer (ByT5's) generate(stop_strings=...) raises ValueError for "é" and never stops at
# "é.": each byte of a character beyond ASCII, decoded alone, is "" or U+FFFD, and in a longer stop string such tokens are
# skipped without a word, so that a model writes on to its limit. In a list the stop strings in ASCII still work.
# Newer versions (5.15 does, 5.10 did not) compare bytes instead, but only where `tokenizer.backend_tokenizer.decoder` is a ByteLevel or
# ByteFallback of the tokenizers library, which a tokenizer written in Python has not got: the last lines give it one.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3
cat > show.py <<'PY'
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation.stopping_criteria import StopStringCriteria

print("transformers", transformers.__version__)
TEXT = "C'était un café."


def met(tokenizer, stops):
    """Whether generation would stop after TEXT, or what is raised instead."""
    ids = torch.tensor([tokenizer.encode(TEXT, add_special_tokens=False)])
    try:
        return bool(StopStringCriteria(tokenizer, stops)(ids, None)[0])
    except ValueError as error:
        return type(error).__name__


plain = ByT5Tokenizer(extra_ids=0)
found = {str(stops): met(plain, stops) for stops in (".", "é", "é.", ["é.", "\n\n"], ["é.", "."])}
for stops, result in found.items():
    print(f"ByT5Tokenizer, after {TEXT!r}, stop {stops}: {result}")
assert list(found.values()) == [True, "ValueError", False, False, True]


class ByteLevel(ByT5Tokenizer):
    """The same ids, under the names that GPT-2 gave to bytes, and with a decoder that says so."""

    names = bytes_to_unicode()
    backend_tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in names.items()}, merges=[]))
    backend_tokenizer.decoder = decoders.ByteLevel()

    def get_vocab(self):
        return {self.names[byte]: byte + 3 for byte in range(256)}

    def _convert_id_to_token(self, index):
        return self.names[index - 3]

    def convert_tokens_to_string(self, tokens):
        return self.backend_tokenizer.decoder.decode(tokens)


for stops in ("é.", ["é.", "\n\n"]):
    result = met(ByteLevel(extra_ids=0), stops)
    print(f"with a ByteLevel decoder, stop {stops}: {result}")
    assert result is True
PY
HF_HUB_OFFLINE=1 venv/bin/python show.py
