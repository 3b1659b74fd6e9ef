#!/usr/bin/env bash
# A training that never compiles anything still imports torch's compiler: the constructor of any `torch.optim` optimizer is
# marked to be left out of compilation, and the mark imports `torch._dynamo`, with SymPy, at its first call. One would guess
# that `torch.optim.AdamW(parameters)` costs microseconds; in a new process it costs about as much as `import torch`.
# `torch.optim.adamw.adamw`, the function that the class calls, moves the same weights and imports nothing.
# It matters to whoever starts many short trainings, in tests, sweeps or workers.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
cat > show.py <<'PY'
import sys
import time

began = time.perf_counter()
import torch
from torch.optim.adamw import adamw

whole = time.perf_counter() - began


def there() -> list[str]:
    return [name for name in ("torch._dynamo", "sympy") if name in sys.modules]


torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
model(torch.ones(2, 4)).sum().backward()
found = [p for p in model.parameters()]
copies = [p.detach().clone() for p in found]
gradients = [p.grad for p in found]
zeros = [[torch.zeros_like(p) for p in found] for _ in range(2)]
steps = [torch.zeros(()) for _ in found]
adamw(copies, gradients, *zeros, [], steps, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=0.1,
      weight_decay=0.01, eps=1e-8, maximize=False)
print("torch", torch.__version__)
print("after a backward pass and a step by the function:", there() or "neither torch._dynamo nor sympy")
assert there() == []
modules, began = len(sys.modules), time.perf_counter()
optimizer = torch.optim.AdamW(found, lr=0.1, fused=True)
seconds = time.perf_counter() - began
print("after torch.optim.AdamW(parameters):", there(), "and", len(sys.modules) - modules, "modules more;")
print(f"the constructor took {seconds:.1f} s, importing torch had taken {whole:.1f} s")
assert there() == ["torch._dynamo", "sympy"] and len(sys.modules) - modules > 500
optimizer.step()
assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
print("both moved the weights alike")
PY
venv/bin/python show.py
