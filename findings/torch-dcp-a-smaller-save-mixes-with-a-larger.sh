#!/usr/bin/env bash
# A job of four processes saves with torch.distributed.checkpoint in the safetensors format, then one of two saves into the
# same folder (as after a restart on fewer machines, with "latest" as its name). One would guess that the second save
# replaces the first, as it does in the format of .distcp, whose .metadata names the files that count.
# HuggingFaceStorageReader reads every safetensors file of the folder: the files of processes 2 and 3 are still there, and
# their parts of the old tensor are put over the new one's, without an error. What is loaded is half one step and half another.
# It matters to every elastic training: save each checkpoint into a new folder, or delete the files of the old one first.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 safetensors==0.8.0 numpy fsspec
cat > show.py <<'PY'
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def save(rank, world, value):
    dist.init_process_group("gloo", store=dist.FileStore(f"meet-{world}", world), rank=rank, world_size=world)
    whole = torch.full((8,), value)
    weight = distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)], src_data_rank=None)
    dcp.save({"weight": weight}, storage_writer=dcp.HuggingFaceStorageWriter("out", save_distributed=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    mp.spawn(save, (4, 4.0), 4)
    mp.spawn(save, (2, 2.0), 2)
    read = {"weight": torch.zeros(8)}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader("out"))
    found = read["weight"].tolist()
    print("saved by four processes: eights of 4.0; then by two: eights of 2.0; read:", found)
    raise SystemExit(0 if set(found) == {2.0, 4.0} else 1)
PY
venv/bin/python -W ignore show.py
