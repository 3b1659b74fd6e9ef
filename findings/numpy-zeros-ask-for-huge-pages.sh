#!/usr/bin/env bash
# numpy.zeros of a large array takes memory when it is used: page by page, one would guess, 4 KiB at a time. On Linux
# numpy asks the system for huge pages (madvise) for every array of 4 MiB and more. Where they are given on request, as
# most distributions have it, the first touch of each 2 MiB clears and keeps all of them: 512 bytes that are written,
# one in each 2 MiB of a gibibyte, make all of the gibibyte resident.
# Why it matters: caches of a batch of sequences are such arrays, [rows, heads, positions, dim]: each head's first
# position is far from the next. In a server the first prompt of each row took 0.3 s instead of 0.03, and a batch of 32
# soon held the memory of 32 sequences of full length. NUMPY_MADVISE_HUGEPAGE=0, or an array over mmap, does not.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
if grep -q '\[never\]' /sys/kernel/mm/transparent_hugepage/enabled; then
  echo "this system gives no huge pages to anybody: nothing to be seen"; exit 0
fi
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6
cat > show.py <<'PY'
import mmap

import numpy as np

SIZE, STRIDE = 1 << 30, 1 << 21


def resident() -> int:
    with open("/proc/self/status") as lines:
        return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) // 1024


def touched(array: np.ndarray) -> int:
    before = resident()
    array[::STRIDE] = 1
    return resident() - before


plain = touched(np.zeros(SIZE, np.uint8))
memory = mmap.mmap(-1, SIZE)
memory.madvise(mmap.MADV_NOHUGEPAGE)
mapped = touched(np.frombuffer(memory, np.uint8))
print(f"numpy {np.__version__}: {SIZE // STRIDE} bytes written, {STRIDE >> 20} MiB apart")
print(f"resident afterwards: {plain} MiB of np.zeros, {mapped} MiB of the same over mmap without huge pages")
raise SystemExit(0 if plain > 500 and mapped < 20 else 1)
PY
venv/bin/python show.py
