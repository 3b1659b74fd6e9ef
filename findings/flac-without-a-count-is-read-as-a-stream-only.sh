#!/usr/bin/env bash
# One would guess: a FLAC file whose header says "number of samples unknown" (0 in STREAMINFO, which the format allows and
# every encoder writes into a pipe) is read like any other, or its length is reported as unknown.
# soundfile reports 9223372036854775807 frames, and reading it raises LibsndfileError (an internal seek fails), whole or
# in blocks. The same file is read to its last sample once the object claims not to be seekable. Why it matters: corpora
# that were made by `ffmpeg ... -f flac - | ...` look damaged, or as if they needed 2^63 samples of memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check soundfile==0.14.0 numpy==2.4.6
env/bin/python - <<'PY'
import numpy, soundfile
print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
soundfile.write("whole.flac", numpy.sin(numpy.arange(3200) / 7) / 2, 8000)
flac = bytearray(open("whole.flac", "rb").read())
flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])  # the 36 bits of STREAMINFO that count samples: unknown
open("piped.flac", "wb").write(flac)

with soundfile.SoundFile("piped.flac") as file:
    print(f"frames = {file.frames}, seekable = {file.seekable()}")
    assert file.frames == 2**63 - 1
    try:
        file.read(4000)
        raise SystemExit("read: this is no longer so")
    except soundfile.LibsndfileError as error:
        print(f"read: LibsndfileError: {error}")

class Stream(soundfile.SoundFile):
    def seekable(self):
        return False

with Stream("piped.flac") as file:
    samples = file.read(4000)
print(f"read as a stream: {len(samples)} samples")
assert numpy.array_equal(samples, soundfile.read("whole.flac")[0])
PY
