#!/usr/bin/env bash
# AutoTokenizer.from_pretrained of a folder without any tokenizer file raises an error, one would think: for a Llama it does.
# For a GPT-2 it returns a GPT2Tokenizer with one token, <|endoftext|>, that encodes every text to no ids at all: nothing
# is raised or logged. What is measured on it is the loss of nothing, or of BOS and EOS. A checkpoint folder of a trainer
# that was not given the tokenizer is such a folder. Look at len(tokenizer) before anything is measured.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q transformers==5.23.0 tokenizers==0.23.3
cat > show.py <<'PY'
import transformers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

print("transformers", transformers.__version__)
found = {}
for name, config in (("llama", LlamaConfig()), ("gpt2", GPT2Config())):
    config.save_pretrained(name)  # config.json, and nothing else
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        found[name] = len(tokenizer), tokenizer.encode("any text at all")
    except ValueError as error:
        found[name] = str(error).splitlines()[0]
    print(f"{name}: {found[name]}")
assert isinstance(found["llama"], str)
assert found["gpt2"] == (1, []), "a folder without a tokenizer is refused by now"
PY
HF_HUB_OFFLINE=1 venv/bin/python show.py
