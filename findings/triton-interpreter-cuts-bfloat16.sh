#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) is how a kernel is tested without a GPU, so that one expects its numbers to be
# the GPU's but for the order of sums. In bfloat16 they are not: a cast from float32 cuts the lower half off, where a GPU
# rounds to the nearest, and tl.dot multiplies the bit patterns of its operands as whole numbers. Nothing is said.
# Test kernels there in float32, and what they do in bfloat16 on a GPU alone.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 triton==3.6.0 numpy==2.3.5
cat > show.py <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def dot(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


torch.manual_seed(0)
x = torch.randn(256)
y = torch.empty(256, dtype=torch.bfloat16)
cast[(1,)](x, y, N=256)
cut = (x.view(torch.int32) & -65536).view(torch.float32)
nearest, truncated = torch.equal(y, x.bfloat16()), torch.equal(y.float(), cut)

a, b = torch.randn(2, 16, 16).bfloat16()
c = torch.empty(16, 16)
dot[(1,)](a, b, c, N=16)
exact = a.float() @ b.float()
error = float((c - exact).abs().max() / exact.abs().max())

print(f"triton {triton.__version__}, torch {torch.__version__}")
print(f"casts to bfloat16: rounded to the nearest {nearest}, cut off {truncated}")
print(f"tl.dot in bfloat16: off by {error:.3g} times the largest result")
raise SystemExit(0 if truncated and not nearest and error > 1e3 else 1)
PY
TRITON_INTERPRET=1 venv/bin/python show.py
