#!/usr/bin/env bash
# Hypothesis, settings(derandomize=True).
# One would guess: the examples of a test depend on the test alone ("each run tries the same examples"), so that what is
# green in CI is green on every machine with the same versions.
# What happens: it also draws constants found in the source of those of your modules (not of libraries, not of
# tests) that happen to be imported by then. Importing an unrelated module before gives other examples.
# Why it matters: with xdist, -k or another order of tests, a "derandomised" suite tries other examples, and a failure
# seen in one run is not in the next. Lazily imported modules do it in the middle of a run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q hypothesis==6.170.15
cd "$folder"

cat > ours.py <<'PY'
LIMITS = [4099, 7919, 104729, 1299709, 15485863, 32452843, 49979687, 67867967, 86028121, 104395301]
PY
cat > check.py <<'PY'
import hashlib, sys
from hypothesis import given, settings, strategies as st

if "import" in sys.argv:
    import ours  # the test does not use it

seen = []

@settings(derandomize=True, database=None, max_examples=500)
@given(st.integers())
def check(n):
    seen.append(n)

check()
print(hashlib.sha256(repr(seen).encode()).hexdigest()[:16], sum(n in (4099, 7919, 104729, 1299709) for n in seen))
PY

"$folder/venv/bin/python" -c "import hypothesis; print('hypothesis', hypothesis.__version__)"
alone=$("$folder/venv/bin/python" check.py)
again=$("$folder/venv/bin/python" check.py)
beside=$("$folder/venv/bin/python" check.py import)
printf 'alone:  %s\nagain:  %s\nbeside an imported module: %s\n' "$alone" "$again" "$beside"
[ "$alone" = "$again" ] || { echo "changed: two runs of one program differ"; exit 1; }
[ "$alone" != "$beside" ] || { echo "changed: the examples are the same"; exit 1; }
echo "as found: derandomised examples depend on which modules are imported"
