#!/usr/bin/env bash
# "split_special_tokens=True" has a text that contains "</s>" encoded as text, one would think: so transformers documents
# it, and for BPE it is so. In a Unigram vocabulary (T5, XLM-R, any converted SentencePiece unigram) the special tokens are
# pieces like others, with the score 0, above that of any real piece: with or without the option "a</s>b" is a, the id
# of EOS, b. So a text can end a document, or put in any other control token of such a vocabulary.
# The pieces that stand for bytes are read in the same way: "<0x41>", six characters of a text, is one id, and decodes to
# "A"; the text does not come back. What one encodes has to be decoded again to know it.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q transformers==5.23.0 tokenizers==0.23.3
cat > show.py <<'PY'
import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
LETTERS = "▁abAxs<>/04"
SPECIALS = {"unk_token": "<unk>", "eos_token": "</s>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(model):
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIALS)


first = ["<unk>", "</s>"]
scored = [(token, 0.0) for token in first] + [(c, -5.0) for c in LETTERS] + [(piece, -9.0) for piece in BYTES]
unigram = fast(models.Unigram(scored, unk_id=0, byte_fallback=True))
bpe = fast(models.BPE({token: i for i, (token, _) in enumerate(scored)}, [], unk_token="<unk>", byte_fallback=True))
found = {}
for name, tokenizer in (("Unigram", unigram), ("BPE", bpe)):
    for text in ("a</s>b", "a<0x41>b"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        found[name, text] = tokenizer.eos_token_id in ids, tokenizer.decode(ids)
        print(f"{name}: {text!r} as {tokenizer.convert_ids_to_tokens(ids)}, decoded {found[name, text][1]!r}")
assert found["BPE", "a</s>b"] == (False, "a</s>b") and found["BPE", "a<0x41>b"] == (False, "a<0x41>b")
assert found["Unigram", "a</s>b"][0], "a special token is text by now"
assert found["Unigram", "a<0x41>b"][1] == "aAb", "a byte's name is text by now"
PY
HF_HUB_OFFLINE=1 venv/bin/python show.py
