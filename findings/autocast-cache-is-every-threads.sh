#!/usr/bin/env bash
# torch.autocast is on for one thread, so one expects that what it keeps is that thread's too. Its cache of weights that
# were cast once is one for all threads, and is emptied when any of them leaves its outermost autocast. A thread that
# evaluates, or prepares data under autocast, has a training step beside it cast its weights anew. Nothing is said. Keep
# autocast out of threads that run beside a step.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.3.5
cat > show.py <<'PY'
import threading

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

layer, x = nn.Linear(64, 64, bias=False), torch.randn(4, 64, dtype=torch.bfloat16)


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Casts.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def elsewhere():
    with torch.autocast("cpu", torch.bfloat16):
        pass


def casts(between):
    Casts.count = 0
    with torch.autocast("cpu", torch.bfloat16), Casts():
        layer(x)
        thread = threading.Thread(target=between)
        thread.start()
        thread.join()
        layer(x)
    return Casts.count


alone, beside = casts(lambda: None), casts(elsewhere)
print(f"torch {torch.__version__}")
print(f"casts of one weight that is read twice: {alone}; where another thread left an autocast meanwhile: {beside}")
raise SystemExit(0 if (alone, beside) == (1, 2) else 1)
PY
venv/bin/python show.py
