#!/usr/bin/env bash
# One would guess that a WAV file whose header has a wrong size is damaged, and that two readers agree on what it holds.
# What happens: whatever is written into a pipe has a made-up size (ffmpeg FFFFFFFF, sox and espeak-ng 7FFFF000, others 0
# or 2000000000). libsndfile reads an impossible size to the end of the file but takes 0 at its word: no samples, no
# error. The wave module gives getnframes() from the header (over two thousand million) and readframes() without an error.
# AIFF differs again: libsndfile reads a FORM size of 0 to the end.
# Why it matters: most generated speech comes that way, and a check "promised more than there is" refuses all of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 soundfile==0.14.0
"$work/venv/bin/python" - <<'PY'
import io
import platform
import struct
import sys
import wave

import numpy as np
import soundfile

print("Python", platform.python_version(), "libsndfile", soundfile.__libsndfile_version__)
pcm = np.arange(500, dtype="<i2").tobytes()


def frames(size):
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 0xFFFFFFFF, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16)
    data = head + struct.pack("<4sI", b"data", size) + pcm
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        found = [len(file.read(file.frames))]
    with wave.open(io.BytesIO(data)) as file:
        return (*found, file.getnframes(), len(file.readframes(file.getnframes())) // 2)


told = {size: frames(size) for size in (0xFFFFFFFF, 0x7FFFF000, 2_000_000_000, 0)}
for size, found in told.items():
    print(f"size {size:10}: libsndfile reads %d of 500 frames; wave promises %d and reads %d" % found)
aiff = io.BytesIO()
soundfile.write(aiff, np.arange(500, dtype="i2"), 8000, "PCM_16", format="AIFF")
data = aiff.getvalue()
of_aiff = soundfile.SoundFile(io.BytesIO(data[:4] + bytes(4) + data[8:])).frames
print("AIFF with a FORM size of 0: libsndfile reads", of_aiff, "of 500 frames")
wanted = [(500, size // 2, 500) for size in told if size] + [(0, 0, 0)]
sys.exit(not (list(told.values()) == wanted and of_aiff == 500))
PY
