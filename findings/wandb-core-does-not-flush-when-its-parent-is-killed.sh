#!/usr/bin/env bash
# One would guess that wandb's offline mode keeps what was logged when the training is killed (kill -9, the OOM killer):
# the writer is a process of its own (wandb-core), to which every step was sent, and which nobody killed.
# But wandb-core writes a block of 32 KiB when it is full, or after some 15 seconds, and ends without writing the rest
# once its parent is gone. A run of 50 steps that was killed 8 seconds after the last of them leaves a file of 7 bytes.
# It matters because the steps before the crash are those that one wants to see. An end by an exception keeps them all.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet wandb==0.31.0
export WANDB_MODE=offline WANDB_SILENT=true WANDB_DIR=$work
cat > run.py <<'PY'
import os, signal, sys, time
import wandb

run = wandb.init(project="p", id=sys.argv[1])
for step in range(50):
    run.log({"loss": 1 / (step + 1)}, step=step)
time.sleep(8)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
raise RuntimeError("an end by an exception")
PY
cat > steps.py <<'PY'
"""How many steps a file has: a LevelDB log of protocol buffers after a mark of 7 bytes."""
import glob, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

(path,) = glob.glob(f"wandb/offline-run-*-{sys.argv[1]}/*.wandb")
data, at, record, steps = open(path, "rb").read(), 7, b"", 0
while at + 7 <= len(data):
    if (left := 32768 - at % 32768) < 7:
        at += left
        continue
    _, size, part = struct.unpack_from("<IHB", data, at)
    record = (b"" if part in (1, 2) else record) + data[at + 7 : at + 7 + size]
    at += 7 + size
    if part in (1, 4):
        steps += Record.FromString(record).HasField("history")
print(len(data), steps)
PY

venv/bin/python -c 'import wandb; print("wandb", wandb.__version__)'
failed=0
for how in raised killed; do
    venv/bin/python run.py "$how" >log 2>&1 || true
    sleep 5 # for a writer that lives on
    read -r size steps <<<"$(venv/bin/python steps.py "$how")"
    echo "50 steps logged, 8 s later $how: $size bytes in the file, $steps steps"
    case $how in
        raised) [[ $steps == 50 ]] || failed=1 ;;
        killed) [[ $size == 7 && $steps == 0 ]] || failed=1 ;;
    esac
done
(( failed == 0 )) || echo "which is not what it was"
exit $failed
