#!/usr/bin/env bash
# load_file of safetensors looks like a function that reads a file: what it returns should be in memory. On the CPU its
# tensors are a private mapping of the file, and so are those of a transformers model loaded in the file's own dtype. As
# long as the program runs, whoever writes into the file (rsync --inplace, cp onto it) changes the weights that are being
# computed with, but for the pages that the program itself has written to since, which keep what they had: one tensor,
# half old and half new, without a word. In another dtype a model is a copy, and nothing happens to it.
# Replace files of weights by renaming, never by writing into them; to be independent of a file, clone.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.3.5
cat > show.py <<'PY'
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


def fill(path, byte):
    """Write into a file, behind its header."""
    with Path(path).open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        size = Path(path).stat().st_size - start
        file.seek(start)
        file.write(bytes([byte]) * size)


print(f"safetensors {safetensors.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
save_file({"w": torch.zeros(16384, dtype=torch.uint8)}, "one.safetensors")
w = load_file("one.safetensors")["w"]
w[0] = 1  # its page is now a copy
fill("one.safetensors", 7)
first, last = w[:3].tolist(), w[-3:].tolist()
print(f"load_file of zeros, w[0] = 1, then the file filled with 7: w[:3] = {first}, w[-3:] = {last}")
seen = [first == [1, 0, 0], last == [7, 7, 7]]

shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
for dtype, changes in ((torch.bfloat16, True), (torch.float32, False)):
    folder = f"model-{changes}"
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape)).bfloat16().save_pretrained(folder)
    weight = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).lm_head.weight
    before = weight.clone()
    fill(f"{folder}/model.safetensors", 0)
    changed = not torch.equal(weight, before)
    seen.append(changed == changes)
    print(f"from_pretrained of bfloat16 in {dtype}, then the file filled with 0: weights of the model changed: {changed}")
raise SystemExit(0 if all(seen) else 1)
PY
venv/bin/python -W ignore show.py
