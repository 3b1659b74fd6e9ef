#!/usr/bin/env bash
# One would guess: SoundFile(path).read() reads any file whole that soundfile.read(path) reads, being what it calls.
# For GSM 6.10 in WAV (telephone recordings) libsndfile cannot seek, and SoundFile.read without a number of frames then
# raises ValueError, although SoundFile.frames has the number; given that number, the same call reads the file. Why it
# matters: it is not a LibsndfileError, so that a loop over a speech corpus which catches those ends at the first clip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check soundfile==0.14.0 numpy==2.4.6
env/bin/python - <<'PY'
import numpy, soundfile
print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
soundfile.write("clip.wav", numpy.sin(numpy.arange(3200) / 7) / 2, 8000, subtype="GSM610")
print(f"soundfile.read(path): {len(soundfile.read('clip.wav')[0])} samples")
with soundfile.SoundFile("clip.wav") as file:
    try:
        file.read()
        raise SystemExit("SoundFile.read without a count: this is no longer so")
    except ValueError as error:
        print(f"SoundFile(path).read(): ValueError: {error}")
    print(f"frames = {file.frames}, seekable = {file.seekable()}, read(frames): {len(file.read(file.frames))} samples")
    assert file.frames == 3200 and not file.seekable()
PY
