#!/usr/bin/env bash
# One would guess that workers which torchrun starts again after a failure meet as the first ones did, in a store that
# knows nothing of them: torch's own source says "we create a new TCPStore for every retry".
# With the c10d rendezvous (--standalone too) all attempts share the store of the rendezvous: keys of the attempt before
# are there, those of ranks and of gloo's addresses among them. A worker that reads the address of a dead one, before it
# is overwritten, ends in "Gloo connectFullMesh failed ... Connection refused": in about half of the restarts with two.
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, read by torchrun itself, gives each attempt a store.
# And in every worker TORCH_NCCL_ASYNC_ERROR_HANDLING is 1 where nobody set it, not torch's default: setdefault in a
# script, or waiting for the documented default, changes nothing.
# It matters to all that put "prepared" or "here" into the default store, and to every restart.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > worker.py <<'PY'
"""Leaves a key in the default store and fails in the first attempt; says in the second whether it is there."""
import os, sys
import torch.distributed as dist

dist.init_process_group("gloo")
store = dist.distributed_c10d._get_default_store()
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print("attempt", attempt, "finds the key:", store.check(["left"]), flush=True)
print("handling", os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"), flush=True)
store.set("left", "yes")
sys.exit(attempt == "0")
PY

venv/bin/python -c 'import torch; print("torch", torch.__version__)'
unset TORCH_NCCL_ASYNC_ERROR_HANDLING
failed=0
try() { # try WANTED DISABLE: one worker, so that no address of another is read
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$2 venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 1 \
        --max-restarts 1 worker.py >log 2>&1 || { cat log; failed=1; }
    echo "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$2: $(grep 'attempt 1' log)"
    grep -q "attempt 1 finds the key: $1" log || { echo "  which is not what it was"; failed=1; }
}
try True 0
try False 1
echo "TORCH_NCCL_ASYNC_ERROR_HANDLING in a worker: $(grep -m1 -o 'handling .*' log)"
grep -q 'handling 1' log || { echo "  which is not what it was"; failed=1; }
exit $failed
