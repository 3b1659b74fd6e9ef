#!/usr/bin/env bash
# torch's FSDP2 (`fully_shard`) replaces the parameters of a module by DTensors. An optimizer that was made of the module
# before still holds the old ones: one would guess that its step fails, or warns, or that the new parameters share memory.
# It does none of these: `step` returns as ever, no gradient is found at the old parameters, and the weights never move.
# It matters to whoever adds `fully_shard` to a training that makes model and optimizer together: the loss only looks bad.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
cat > show.py <<'PY'
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

warnings.simplefilter("error")  # nothing is said, or this would end here
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")


def moved(before: bool) -> float:
    """How far a step moves the weights, with the optimizer made before or after `fully_shard`."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1) if before else None
    fully_shard(model)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
    start = model.weight.full_tensor().clone()
    model(torch.ones(2, 4)).sum().backward()
    assert model.weight.grad is not None
    optimizer.step()
    return float((model.weight.full_tensor() - start).detach().abs().max())


print("torch", torch.__version__)
early, late = moved(before=True), moved(before=False)
print("made before fully_shard: weights move by", early)
print("made after fully_shard:  weights move by", round(late, 3))
assert early == 0.0 and late > 0.09
dist.destroy_process_group()
PY
venv/bin/python show.py
