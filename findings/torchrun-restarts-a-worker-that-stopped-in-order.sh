#!/usr/bin/env bash
# One would guess that a worker which hears SIGTERM, saves and ends with 128 + 15, as every shell and scheduler has it,
# has ended: torchrun would end the others and stop.
# It takes every code but 0 for a failure: with --max-restarts all workers are started again, and the job that was asked
# to end trains on. A worker has to end with 0 to be let go.
# It matters to whoever stops a training by a signal to one of its processes, and to what a node sends to all of them.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > worker.py <<'PY'
"""Is sent SIGTERM in its first attempt, stops in order with the code that was asked for; ends with 0 in the second."""
import os, signal, sys

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(int(sys.argv[1])))
print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGTERM)
PY

venv/bin/python -c 'import torch; print("torch", torch.__version__)'
failed=0
for code in 143 0; do
    venv/bin/python -m torch.distributed.run --nproc-per-node 1 --max-restarts 1 worker.py "$code" >log 2>&1 || failed=1
    found=$(grep -c '^attempt' log)
    echo "a worker that stops with $code is started $found times"
    [[ $found == $([[ $code == 0 ]] && echo 1 || echo 2) ]] || { echo "  which is not what it was"; failed=1; }
done
exit $failed
