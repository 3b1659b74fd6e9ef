#!/usr/bin/env bash
# One would guess: whoever keeps something that was made from a weight (packed, quantised, exported) can tell that the
# weight changed by its identity, its `data_ptr()` and the counter `_version`, which every in-place operation raises.
# What happens: peft's `merge_and_unload()` ends with the very same Parameter at the same address with the same
# `_version`, and other numbers in it, because it adds through `.data`. So do many averages of weights (EMA).
# Why it matters: an inference engine that keys its packed weights so goes on with the model as it was before the merge.
# Only the contents tell: a checksum of a weight costs one reading of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"
"$folder/venv/bin/python" -W ignore - <<'PY'
import peft, torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).eval()
weight = model.model.layers[0].self_attn.q_proj.weight
before, seen = weight.detach().clone(), (weight.data_ptr(), weight._version)
lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
merged = peft.get_peft_model(model, lora).merge_and_unload().model.layers[0].self_attn.q_proj.weight
same, changed = merged is weight and (merged.data_ptr(), merged._version) == seen, not torch.equal(merged, before)
print("torch", torch.__version__, "peft", peft.__version__)
print(f"after merge_and_unload: same Parameter, address and _version: {same}; other numbers: {changed}")
raise SystemExit(not (same and changed))
PY
