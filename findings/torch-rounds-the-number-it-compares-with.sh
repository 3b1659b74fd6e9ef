#!/usr/bin/env bash
# x > 1.335442 reads as a comparison of the elements of x with that number. torch first rounds the number to the dtype of
# x, and so it does a tensor without dimensions; a tensor with one dimension is not rounded, x is converted instead. In
# bfloat16 1.335442 is 1.3359375, so that elements of 1.3359375, which are larger, are not: they are "equal" to it.
# Why it matters: a threshold that was found in float32 is another one in bfloat16, by up to 1/256 between 1 and 2, beside
# whatever the rounding of x does. transformers' BLT has its published threshold there: loaded in bfloat16 it does not
# start a patch at such an entropy, one of the 128 values between 1 and 2. Compare in float32: x.float() > threshold.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 numpy==2.3.5
cat > show.py <<'PY'
import torch
import transformers
from transformers.models.blt.modeling_blt import BltPatcher

threshold = transformers.BltConfig().patching_threshold
x = torch.tensor([1.3359375], dtype=torch.bfloat16)
forms = {
    "element": x.item() > threshold,
    "number": bool(x > threshold),
    "tensor of no dimension": bool(x > torch.tensor(threshold)),
    "tensor of one dimension": bool(x > torch.tensor([threshold])),
    "in float32": bool(x.float() > threshold),
}
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print(f"{x.item()} > {threshold}, by what it is compared as: {forms}; ==: {bool(x == threshold)}")

values = (1 + torch.arange(128) / 128).bfloat16()  # all there are from 1 to 2
entropies = torch.cat([torch.zeros(1), values])[None]  # that of BOS is not looked at
counts = [
    BltPatcher.patch_lengths_from_entropies(entropies.to(dtype), 129, patch_size=4, threshold=threshold).shape[1]
    for dtype in (torch.float32, torch.bfloat16)
]
print(f"patches at the same entropies, in float32 and in bfloat16: {counts}")
wanted = {"element": True, "number": False, "tensor of no dimension": False}
wanted |= {"tensor of one dimension": True, "in float32": True}
raise SystemExit(0 if forms == wanted and bool(x == threshold) and counts[0] == counts[1] + 1 else 1)
PY
venv/bin/python -W ignore show.py
