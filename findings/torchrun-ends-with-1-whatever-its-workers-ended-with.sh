#!/usr/bin/env bash
# One would guess that torchrun ends with the exit code of the worker that failed, as mpirun, srun and a shell do, so that
# a job script can tell a full disk, bad data or "out of time, queue me again" apart.
# It ends with 1 whatever a worker ended with, 3, 75 (EX_TEMPFAIL) or a signal alike; the code stands only in the report
# that it prints on standard error, or in the file that TORCHELASTIC_ERROR_FILE names.
# It matters to every job that is queued again by its exit code.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > worker.py <<'PY'
import os, signal, sys

if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
PY

venv/bin/python -c 'import torch; print("torch", torch.__version__)'
failed=0
for how in 0 3 75 killed; do
    code=0
    venv/bin/python -m torch.distributed.run --nproc-per-node 1 worker.py "$how" >log 2>&1 || code=$?
    said=$(grep -oE 'exitcode *: -?[0-9]+' log | head -1 | tr -d ' ' || true)
    echo "a worker that ends with $how: torchrun ends with $code ${said:+(and prints $said)}"
    case $how in 0) wanted="0 " ;; killed) wanted="1 exitcode:-9" ;; *) wanted="1 exitcode:$how" ;; esac
    [[ "$code $said" == "$wanted" ]] || { echo "  which is not what it was"; failed=1; }
done
exit $failed
