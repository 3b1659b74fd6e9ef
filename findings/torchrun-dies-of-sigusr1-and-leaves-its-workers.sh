#!/usr/bin/env bash
# One would guess that torchrun hands SIGUSR1, which Slurm sends ahead of the end of a job (--signal=USR1@60), on to its
# workers, so that they can save a checkpoint; or, failing that, that it takes them with it when it ends.
# It does neither: it handles SIGTERM, SIGINT, SIGHUP and SIGQUIT alone, dies of SIGUSR1 at once, and the workers go on
# training as orphans: nobody waits for them, and they see no signal at all. With SIGUSR1 named in --signals-to-handle
# they are given it, and torchrun ends with 1 and a traceback.
# It matters because the very job that asked for time to save loses what it did, or computes on for nobody.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > worker.py <<'PY'
"""Beats for 20 seconds; notes a signal and ends then."""
import os, signal, sys, time

name = f"{sys.argv[1]}-{os.environ['RANK']}"

def heard(number, frame):
    open(f"{name}.heard", "w").write(str(number))
    sys.exit(0)

signal.signal(signal.SIGUSR1, heard)
open(f"{name}.pid", "w").write(str(os.getpid()))
for beat in range(200):
    open(f"{name}.beat", "w").write(str(beat))
    time.sleep(0.1)
PY

try() { # try NAME OPTION... : sends SIGUSR1 to torchrun once both workers beat; its exit code in $code
    local name=$1
    shift
    venv/bin/python -m torch.distributed.run --nproc-per-node 2 "$@" worker.py "$name" >"$name.log" 2>&1 &
    local launcher=$!
    until [[ -e $name-0.beat && -e $name-1.beat ]]; do sleep 0.2; done
    kill -USR1 $launcher
    code=0
    wait $launcher || code=$?
}

failed=0
expect() { # expect TEXT WANTED FOUND
    echo "$1: $3"
    [[ $2 == "$3" ]] || { echo "  but it was: $2"; failed=1; }
}
beats() { cat plain-0.beat plain-1.beat | tr '\n' ' '; }

venv/bin/python -c 'import torch; print("torch", torch.__version__)'
try plain
expect "torchrun ends of the signal, with 128 + 10" 138 "$code"
before=$(beats)
sleep 2
expect "its workers beat on without it" yes "$([[ $before != "$(beats)" ]] && echo yes || echo no)"
expect "workers that heard a signal" 0 "$(ls | grep -c 'plain-.*heard' || true)"
kill $(cat plain-0.pid) $(cat plain-1.pid) # the orphans
try named --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
expect "with --signals-to-handle torchrun ends with" 1 "$code"
expect "workers that heard the signal" "10 10" "$(cat named-0.heard) $(cat named-1.heard)"
exit $failed
