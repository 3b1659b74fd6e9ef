#!/usr/bin/env bash
# One would guess: `generate(ids, past_key_values=cache)` with a cache that has already read all of `ids` goes on after
# them, as it does with a cache that has read all but the last id.
# What happens: `_prefill` keeps the `length - past = 0` newest columns by slicing `ids[:, -0:]`, which is every column.
# The whole prompt is read a second time behind itself, and other tokens come out, without a word.
# Why it matters: to read a prompt once into a cache and then generate from it is the obvious way to share a prompt.
# A cache class must crop itself by one there, and callers must leave the last id unread.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch, transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).eval()
ids = torch.randint(3, 64, (1, 10))
greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
wanted = model.generate(ids, **greedy)
print("transformers", transformers.__version__)
found = {}
for read in (9, 10):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :read], past_key_values=cache)
    same = torch.equal(model.generate(ids, past_key_values=cache, **greedy), wanted)
    found[read] = (same, cache.get_seq_length())
    print(f"cache with {read} of 10 ids: same tokens as without: {same}, positions in the cache afterwards: {found[read][1]}")
raise SystemExit(found != {9: (True, 21), 10: (False, 31)})
PY
