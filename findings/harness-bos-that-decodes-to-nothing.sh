#!/usr/bin/env bash
# A tokenizer whose decode() leaves BOS and EOS out of the text is only tidy, one would think: encode() still adds a BOS.
# lm-evaluation-harness' `hf` model takes BOS and EOS by their decoded text. Where that is "", every text "already starts
# with BOS", so that contexts are encoded without one, and "" is appended to the stop strings of generate_until, where it
# is found after the first token: each answer is one token long. Nothing is raised or logged; log-likelihoods and exact
# matches are just those of a worse model. Generation adds the BOS all the same, as it compares tokenizer.bos_token.
# Typical of tokenizers of bytes, which have no text for what is no byte. Let decode() show specials unless it is told to
# skip them.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 lm-eval==0.4.13
cat > show.py <<'PY'
import logging

import lm_eval
import torch
from importlib.metadata import version
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizer

logging.disable()
BOS, EOS = 256, 257


class Bytes(PreTrainedTokenizer):
    """Ids 0..255 are bytes; a BOS goes in front. `shown` says whether decode() shows specials."""

    shown = False

    def __init__(self):
        super().__init__(bos_token="<s>", eos_token="</s>", pad_token="</s>", special_tokens_pattern="bos")

    vocab_size = 258

    def get_vocab(self):
        return {chr(byte): byte for byte in range(256)} | {"<s>": BOS, "</s>": EOS}

    def _tokenize(self, text, **_):
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index):
        return {BOS: "<s>", EOS: "</s>"}.get(index) or chr(index)

    def _decode(self, token_ids, skip_special_tokens=False, **_):
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        names = {BOS: b"<s>", EOS: b"</s>"} if self.shown and not skip_special_tokens else {}
        return b"".join(names.get(i, b"") if i > 255 else bytes([i]) for i in ids).decode(errors="replace")


class Shown(Bytes):
    shown = True


torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=1, n_head=2))
print("lm_eval", version("lm_eval"))
found = {}
for kind in (Bytes, Shown):
    tokenizer = kind()
    assert tokenizer.encode("abc") == [BOS, *b"abc"]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    likely = Instance("loglikelihood", {}, ("abc", "def"), 0)
    ask = Instance("generate_until", {}, ("abc", {"until": ["\n\n\n"], "max_gen_toks": 12}), 0)
    ids, ((nats, _),) = harness.tok_encode("abc"), harness.loglikelihood([likely])
    (written,) = harness.generate_until([ask])
    found[kind] = (BOS in ids, nats, len(written))
    print(f"BOS decoded to {tokenizer.decode(BOS)!r}: context read as {ids}, log p {nats:.4f}, {len(written)} characters written")
assert found[Bytes][0] is False and found[Shown][0] is True, "the harness encodes a BOS by its id by now"
assert abs(found[Bytes][1] - found[Shown][1]) > 1e-4
assert found[Bytes][2] == 1 < found[Shown][2], "an empty stop string is left out by now"
PY
HF_HUB_OFFLINE=1 venv/bin/python show.py
