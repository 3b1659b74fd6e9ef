#!/usr/bin/env bash
# torch.distributed.checkpoint writes safetensors with HuggingFaceStorageWriter, and with enable_consolidation=True joins
# the shards of all processes into whole files. One would guess that a joined file holds what the shards hold.
# A tensor without dimensions is 0 there: no byte of it is copied, and nothing is said. The step counts of AdamW are such
# tensors, so that an optimizer that is loaded from the joined file makes its next step as if it were the first.
# It matters to whoever keeps the joined files and deletes the shards. A tensor of one dimension with one element is kept.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 safetensors==0.8.0 numpy fsspec
cat > show.py <<'PY'
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

if __name__ == "__main__":
    print("torch", torch.__version__)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    held = {"one element": torch.tensor([7.0]), "step": torch.tensor(7.0)}
    writer = dcp.HuggingFaceStorageWriter(
        "out", fqn_to_index_mapping=dict.fromkeys(held, 1), save_distributed=True, enable_consolidation=True
    )
    dcp.save(dict(held), storage_writer=writer)
    dist.destroy_process_group()
    found = {place: load_file(next(Path(place).glob("*.safetensors"))) for place in ("out/sharded", "out")}
    for place, tensors in found.items():
        print(f"{place:11} {({name: tensors[name].tolist() for name in held})}")
    shards, joined = found.values()
    as_it_was = shards["step"] == 7 and joined["step"] == 0 and joined["one element"] == 7
    raise SystemExit(0 if as_it_was else 1)
PY
venv/bin/python -W ignore show.py
